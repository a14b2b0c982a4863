"""What a user can get wrong: one sentence, exit status 2, no traceback, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from megadyn.config.config_map import to_hf_config
from megadyn.pretrain import main
from tests.helpers.tiny import ROOT, tiny_config

Break = Callable[[Path, Path], list[str]]
"""Breaks something, given the dataset's prefix (a copy) and a scratch folder; returns overrides."""


def truncated(suffix: str) -> Break:
    def break_it(prefix: Path, _: Path) -> list[str]:
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(path.read_bytes()[:-7])
        return [f"data.train={prefix}"]

    return break_it


def another_tokenizer(prefix: Path, _: Path) -> list[str]:
    record = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(record | {"fingerprint": "0" * 64, "tokenizer": "other"}))
    return [f"data.train={prefix}"]


def ids_without_a_row(prefix: Path, _: Path) -> list[str]:
    """A dataset that nothing is known of, as Megatron-LM writes them, with an id behind the byte tokenizer's 257."""
    Path(f"{prefix}.json").unlink()
    tokens = np.fromfile(f"{prefix}.bin", "<u2")
    tokens[-1] = 257
    tokens.tofile(f"{prefix}.bin")
    return [f"data.train={prefix}"]


def another_architecture(_: Path, scratch: Path) -> list[str]:
    (scratch / "gpt2").mkdir()
    (scratch / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8}')
    return [f"checkpoint.init_from={scratch / 'gpt2'}"]


def missing_shard(_: Path, scratch: Path) -> list[str]:
    folder = scratch / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(tiny_config().model, "float32")))
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'
    )
    return [f"checkpoint.init_from={folder}"]


def another_kind(_: Path, scratch: Path) -> list[str]:
    folder = scratch / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(tiny_config().model, "float32")))
    save_file({}, folder / "model.safetensors")
    return [f"checkpoint.init_from={folder}", "model.routing.kind=mod"]


def a_run(_: Path, scratch: Path) -> list[str]:
    (scratch / "run/checkpoints").mkdir(parents=True)
    return [f"checkpoint.init_from={scratch / 'run'}"]


def a_checkpoint(_: Path, scratch: Path) -> list[str]:
    folder = scratch / "run/checkpoints/iteration-00000002"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return [f"checkpoint.init_from={folder}"]


CASES: dict[str, tuple[list[str] | Break, str]] = {
    "unknown key": (["model.hiden_size=64"], "did you mean 'hidden_size'"),
    "unknown section": (["trainign.iterations=3"], "did you mean 'training'"),
    "wrong type": (["training.iterations=many"], "training.iterations"),
    "not an override": (["training.iterations"], "key=value"),
    "impossible combination": (["model.num_heads=6", "model.num_kv_heads=2"], "model.hidden_size"),
    "tensor does not divide": (["parallel.tensor=3"], "divisor of model.num_heads"),
    "more ranks than processes": (["parallel.tensor=2"], "number of processes = 1"),
    "pipeline with ZeRO-2": (
        ["parallel.pipeline=2", f"deepspeed_config={ROOT}/ds_configs/zero2.json"],
        "0 or 1 with parallel.pipeline",
    ),
    "bf16 with ZeRO-0": (
        ["precision=bf16", f"deepspeed_config={ROOT}/ds_configs/zero0.json"],
        "at least 1 with precision",
    ),
    "no engine settings": (["deepspeed_config=nowhere.json"], "nowhere.json"),
    "batch not divisible": (["training.micro_batch_size=3"], "training.global_batch_size"),
    "longer than the model": (["model.max_position=32"], "training.sequence_length"),
    "missing dataset": (["data.train=nowhere/x"], "nowhere/x"),
    "missing tokenizer": (["tokenizer.path=nowhere"], "nowhere"),
    "vocabulary too small": (["model.vocab_size=100"], "at least the tokenizer's 257"),
    "dataset too short": (["training.sequence_length=100000000"], "too few"),
    "flash without a GPU": (["model.attention=flash"], "sdpa on this machine"),
    "Triton's kernels without a GPU": (["training.kernels=triton"], "torch on this machine: no CUDA device"),
    "resume from nowhere": (["checkpoint.resume=nowhere"], "no such folder"),
    "start from nowhere": (["checkpoint.init_from=nowhere"], "nowhere"),
    "start from another architecture": (another_architecture, "model_type 'gpt2'"),
    "start from another kind": (another_kind, "that is a dtf model, this is mod (model.routing.kind)"),
    "start from a run": (
        a_run,
        "is a run of megadyn, not a Hugging Face folder: export it (megadyn export",
    ),
    "start from a checkpoint": (
        a_checkpoint,
        "is a checkpoint of megadyn, not a Hugging Face folder: export it",
    ),
    "start from two places": (
        ["checkpoint.init_from=a", "checkpoint.resume=b"],
        "null with checkpoint.fork_from",
    ),
    "a variable that is not set": (
        ["output_dir=$NOT_SET_AT_ALL/x"],
        "the environment variable NOT_SET_AT_ALL is not set",
    ),
    "start from a folder with a missing shard": (missing_shard, "model-00002-of-00002.safetensors"),
    "truncated .bin": (truncated(".bin"), ".bin"),
    "truncated .idx": (truncated(".idx"), ".idx"),
    "another tokenizer's dataset": (another_tokenizer, "other"),
    "token ids without a row": (
        ids_without_a_row,
        "its largest token id is 257, but the model's vocabulary has 257 ids",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_sentence(
    case: str,
    config_file: Path,
    dataset: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken, said = CASES[case]
    if not isinstance(broken, list):
        copy = tmp_path / "copy" / "bytes"
        copy.parent.mkdir()
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(f"{dataset}{suffix}", f"{copy}{suffix}")
        broken = broken(copy, tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main([str(config_file), *broken]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_missing_and_malformed_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("model: [1, 2\n")
    for path in (tmp_path / "none.yaml", tmp_path / "bad.yaml"):
        assert main([str(path)]) == 2
        assert f"error: {path}" in capfd.readouterr().err


def test_exit_status_reaches_the_shell(config_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megadyn.pretrain", config_file, "model.num_layer=2"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean 'num_layers'" in done.stderr
