"""What the engine computes, the exported folder computes: against the independent oracle, and against Qwen2."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megadyn.checkpoint.export import export
from megadyn.data.indexed import IndexedDataset
from megadyn.errors import UserError, run_tool
from megadyn.evaluation.losses import evaluate
from megadyn.evaluation.saved import load_network, open_saved
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from tests.helpers.oracle import oracle_logits, oracle_loss
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import ROOT, micro_batches, tiny_config, tiny_tokens

VOCAB = 259
"""Odd, so that two tensor ranks pad it, and above the byte tokenizer's ids."""
LAYOUTS = {"dtf-tensor": ("dtf", 2, 1), "dtf-pipeline": ("dtf", 1, 2), "dense-tensor": ("dense", 2, 1)}
MASKED = "dtf-tensor-masked"
"""A run of the first layout that masks its samples by document."""
MODES = ("topk", "causal")


def held_out() -> torch.Tensor:
    return tiny_tokens(9, vocab=VOCAB)[-1]


def random_qwen2(folder: Path) -> None:
    """A random Qwen2, and beside it copies that lack a tensor and have one too many."""
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
            tie_word_embeddings=False,
            initializer_range=0.2,
            use_sliding_window=False,
        )
    ).eval()
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.2)  # zeros at first, which would hide a lost bias
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for case, changed in (
        ("missing", {k: v for k, v in tensors.items() if k != "model.layers.2.mlp.up_proj.weight"}),
        ("unexpected", tensors | {"model.layers.0.extra.weight": torch.ones(2)}),
    ):
        (folder.parent / case).mkdir()
        (folder.parent / case / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(changed, folder.parent / case / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoints of three small runs on two processes, and the engine's evaluation losses."""
    folder = tmp_path_factory.mktemp("trained")
    random_qwen2(folder / "qwen2")
    run_on_ranks(_train_all, 2, str(folder))
    return folder, json.loads((folder / "losses.json").read_text())


def _train_all(folder: str) -> None:
    from megadyn.checkpoint import save_load
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.launch import launch
    from megadyn.parallel.grid import make_grid

    def engine_for(kind: str, tensor: int, pipeline: int, *, masked: bool = False) -> Engine:
        config = tiny_config(kind, tensor=tensor, pipeline=pipeline, vocab_size=VOCAB, ffn_size=128)
        config.data.document_mask = masked
        return Engine(config, batch_plan(config, 2), make_grid(tensor, pipeline), 256 if masked else None)

    def losses_of(engine: Engine) -> dict[str, float]:
        batches = micro_batches(held_out(), 1)
        return {mode: engine.evaluate(batches, len(batches), mode) for mode in MODES}

    launch.join()
    losses = {}
    for name, layout in LAYOUTS.items():
        engine = engine_for(*layout)
        for samples in tiny_tokens(6, vocab=VOCAB):
            engine.train_step(micro_batches(samples, 1), 1e-3)
        save_load.save(engine, Path(folder) / name, iteration=6, consumed_samples=24)
        losses[name] = losses_of(engine)
        engine.engine.destroy()
    masked = engine_for(*LAYOUTS["dtf-tensor"], masked=True)
    for samples in tiny_tokens(6, vocab=VOCAB):
        masked.train_step(micro_batches(samples, 1), 1e-3)
    save_load.save(masked, Path(folder) / MASKED, iteration=6, consumed_samples=24)
    masked.engine.destroy()
    for tensor, pipeline in ((2, 1), (1, 2)):
        engine = engine_for("dense", tensor, pipeline)
        save_load.init_from(engine, Path(folder) / "qwen2")
        losses[f"qwen2 at {tensor} x {pipeline}"] = losses_of(engine)
        engine.engine.destroy()
    upcycled = engine_for("dtf", 1, 2)
    save_load.init_from(upcycled, Path(folder) / "qwen2")
    losses["upcycled"] = losses_of(upcycled)
    upcycled.engine.destroy()
    again = engine_for("dtf", 1, 2)
    if dist.get_rank() == 0:
        export(Path(folder) / "dtf-pipeline" / "iteration-00000006", Path(folder) / "restart")
    dist.barrier()
    save_load.init_from(again, Path(folder) / "restart")
    losses["from our export"] = losses_of(again)
    for case in ("missing", "unexpected"):
        try:
            save_load.init_from(again, Path(folder) / case)
        except UserError as error:
            losses[case] = str(error)
    if dist.get_rank() == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request: pytest.FixtureRequest, trained: tuple[Path, dict[str, Any]]) -> tuple[str, Path]:
    folder, _ = trained
    output = folder / f"{request.param}-hf"
    # Shards so small that the weights need several files and their index.
    summary = export(folder / request.param / "iteration-00000006", output, shard_bytes=40_000)
    assert summary["shards"] > 2
    return request.param, output


@pytest.mark.parametrize("mode", MODES)
def test_engine_agrees_with_the_oracle(
    exported: tuple[str, Path], mode: str, trained: tuple[Path, dict[str, Any]]
) -> None:
    name, folder = exported
    samples = held_out().numpy()
    want = oracle_loss(folder, samples[:, :-1], samples[:, 1:], mode=mode)
    assert trained[1][name][mode] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_exported_model_agrees_with_the_oracle(exported: tuple[str, Path], mode: str) -> None:
    _, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.config.routing_mode = mode
    tokens = held_out()[:, :-1]
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    np.testing.assert_allclose(
        logits.double().numpy(), oracle_logits(folder, tokens.numpy(), mode=mode), atol=2e-4
    )


def test_routing_modes_differ(trained: tuple[Path, dict[str, Any]]) -> None:
    """The comparisons above would pass a model that ignores the mode, if the modes were equal."""
    losses = trained[1]["dtf-tensor"]
    assert abs(losses["topk"] - losses["causal"]) > 1e-4
    assert trained[1]["dense-tensor"]["topk"] == trained[1]["dense-tensor"]["causal"]


def test_export_at_every_topology_is_one_model(trained: tuple[Path, dict[str, Any]]) -> None:
    assert trained[1]["dtf-tensor"]["topk"] == pytest.approx(trained[1]["dtf-pipeline"]["topk"], rel=1e-5)


def test_dense_as_qwen2_gives_our_logits(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    checkpoint, output = folder / "dense-tensor" / "iteration-00000006", folder / "as-qwen2"
    export(checkpoint, output, style="qwen2")
    theirs = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(theirs, Qwen2ForCausalLM)
    ours = load_network(open_saved(checkpoint), torch.device("cpu"))
    tokens = held_out()[:, :-1]
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_qwen2_read_by_us_gives_its_logits(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, losses = trained
    theirs = AutoModelForCausalLM.from_pretrained(folder / "qwen2")
    ours = load_network(open_saved(folder / "qwen2"), torch.device("cpu"))
    samples = held_out()
    with torch.no_grad():
        logits = theirs(samples[:, :-1]).logits
        assert (ours(samples[:, :-1]) - logits).abs().max() < 1e-4
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()
    for layout in ("2 x 1", "1 x 2"):
        assert losses[f"qwen2 at {layout}"]["topk"] == pytest.approx(want, rel=1e-5)
    # routed: half the tokens skip half the layers
    assert losses["upcycled"]["topk"] != pytest.approx(want, rel=1e-3)


def test_a_run_started_from_our_export_is_that_model(trained: tuple[Path, dict[str, Any]]) -> None:
    """Its running thresholds too: the causal loss shows them."""
    _, losses = trained
    for mode in MODES:
        assert losses["from our export"][mode] == pytest.approx(losses["dtf-pipeline"][mode], rel=1e-5)


def test_routed_model_is_refused_as_qwen2(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only a dense one"):
        export(trained[0] / "dtf-tensor" / "iteration-00000006", tmp_path / "out", style="qwen2")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A dataset of bytes: its prefix, its documents, and the bytes of their texts."""
    folder, texts = tmp_path_factory.mktemp("text"), ["Grüße aus dem Text", "and some more of it, " * 9]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(Corpus([folder / "corpus.jsonl"]), "byte", folder / "bytes", append_eod=True)
    return folder / "bytes", len(texts), len("".join(texts).encode())


def test_evaluation_at_any_topology(
    trained: tuple[Path, dict[str, Any]], text: tuple[Path, int, int], tmp_path: Path
) -> None:
    """Loss, perplexity and bits per byte of checkpoints of two ranks, by tensor and by pipeline, and of an export."""
    prefix, documents, size = text
    folder = trained[0] / "dtf-tensor" / "iteration-00000006"
    export(folder, tmp_path / "hf")
    stream = torch.from_numpy(IndexedDataset(prefix).tokens[:].astype(np.int64))
    samples = stream[: len(stream) - (len(stream) - 1) % 24].unfold(0, 25, 24).numpy()
    for path in (folder, trained[0] / "dtf-pipeline" / "iteration-00000006", tmp_path / "hf"):
        found = evaluate(path, prefix, modes=MODES, batch_size=2)
        assert found["tokens"] == samples[:, 1:].size > 7 * 24
        for mode in MODES:
            loss = oracle_loss(tmp_path / "hf", samples[:, :-1], samples[:, 1:], mode=mode)
            assert found[mode] == pytest.approx(loss, rel=1e-5)
            assert found["perplexity"][mode] == pytest.approx(2.718281828459045**loss, rel=1e-4)
            assert found["bits_per_byte"][mode] == pytest.approx(
                loss / 0.6931471805599453 * (size + documents) / size, rel=1e-5
            )
        assert found["topk"] != pytest.approx(found["causal"], rel=1e-4)


def test_export_of_a_masked_run_is_scored_with_the_mask(
    trained: tuple[Path, dict[str, Any]], text: tuple[Path, int, int], tmp_path: Path
) -> None:
    """By tools/evaluate.py, and by the exported model itself: as the checkpoint is."""
    checkpoint, folder = trained[0] / MASKED / "iteration-00000006", tmp_path / "hf"
    export(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["document_mask"], config["eod_token_id"]) == (True, 256)
    wanted = evaluate(checkpoint, text[0], modes=MODES)
    found = evaluate(folder, text[0], modes=MODES)
    stream = torch.from_numpy(IndexedDataset(text[0]).tokens[:].astype(np.int64))
    samples = stream[: len(stream) - (len(stream) - 1) % 24].unfold(0, 25, 24)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for mode in MODES:
        assert found[mode] == pytest.approx(wanted[mode], rel=1e-6)
        model.config.routing_mode = mode
        with torch.no_grad():
            logits = model(samples[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
        assert loss.item() == pytest.approx(wanted[mode], rel=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"document_mask": False}))
    assert evaluate(folder, text[0], modes=MODES)["topk"] != pytest.approx(wanted["topk"], rel=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"eod_token_id": None}))
    with pytest.raises(UserError, match="eod_token_id = None in config.json"):
        evaluate(folder, text[0], modes=MODES)


def test_dataset_of_another_tokenizer_is_refused(
    trained: tuple[Path, dict[str, Any]],
    text: tuple[Path, int, int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By a checkpoint and by its export; where the tokenizer cannot be told, the log says so."""
    checkpoint, hf, prefix = (
        trained[0] / "dense-tensor" / "iteration-00000006",
        tmp_path / "hf",
        tmp_path / "other",
    )
    export(checkpoint, hf)
    for suffix in ("bin", "idx"):
        shutil.copy(f"{text[0]}.{suffix}", f"{prefix}.{suffix}")
    record = json.loads(Path(f"{text[0]}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(record | {"fingerprint": "0" * 64, "tokenizer": "other"}))
    for path in (checkpoint, hf):
        with pytest.raises(UserError, match="made with tokenizer other"):
            evaluate(path, prefix, modes=["topk"])
    assert not caplog.messages
    (hf / "tokenizer_config.json").unlink()
    evaluate(hf, prefix, modes=["topk"])
    assert "the model does not record its tokenizer" in caplog.text


def tool_named(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_bits_per_byte_need_a_record_of_the_bytes(
    trained: tuple[Path, dict[str, Any]],
    text: tuple[Path, int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = tool_named("evaluate")
    for suffix in ("bin", "idx"):
        shutil.copy(f"{text[0]}.{suffix}", tmp_path / f"bare.{suffix}")
    checkpoint = str(trained[0] / "dense-tensor")
    for prefix, known in ((text[0], True), (tmp_path / "bare", False)):
        tool.main(
            [
                "--checkpoint",
                checkpoint,
                "--data",
                str(prefix),
                "--routing",
                "causal",
                "--samples",
                "2",
                "--json",
            ]
        )
        out = capsys.readouterr().out
        assert ("bits per byte: unknown" not in out) == (" bits per byte\n" in out) == known
        assert (json.loads(out.splitlines()[-1])["bits_per_byte"] is not None) == known


def test_export_has_a_card_and_its_generation_settings(exported: tuple[str, Path]) -> None:
    name, folder = exported
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.library_name == "transformers"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert f"of {sum(parameter.numel() for parameter in model.parameters()):,} parameters" in text
    assert name.split("-")[0].upper() in text.upper()
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 256
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert (
        sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values())
        == (index["metadata"]["total_size"])
    )


@pytest.mark.parametrize(("layout", "style"), [("dtf-pipeline", "megadyn"), ("dense-tensor", "qwen2")])
def test_code_of_the_card_runs(
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    layout: str,
    style: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export(trained[0] / layout / "iteration-00000006", tmp_path / "out", style=style)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    exec(code, {"FOLDER": str(tmp_path / "out")})
    assert capsys.readouterr().out.startswith("Once")


@pytest.mark.parametrize(
    ("size", "fewest"), [("0.04MB", 3), ("39KiB", 3), ("1GB", 1), ("40000", 3), ("0", 0), ("5 pages", 0)]
)
def test_size_of_shards(
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    size: str,
    fewest: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = trained[0] / "dense-tensor"
    args = [
        "to-hf",
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(tmp_path / "out"),
        "--max-shard-size",
        size,
    ]
    assert run_tool(lambda: tool_named("convert_checkpoint").main(args)) == (0 if fewest else 2)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= fewest
    assert (
        fewest < 3
        or max(sum(tensor.nbytes for tensor in load_file(path).values()) for path in files) <= 40_000
    )
    assert (capsys.readouterr().err == "") == bool(fewest)


def test_only_an_empty_folder_or_an_earlier_export_is_written_over(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint, output = trained[0] / "dense-tensor" / "iteration-00000006", tmp_path / "out"
    output.mkdir()
    export(checkpoint, output)
    with pytest.raises(UserError, match="exists; pass --overwrite"):
        export(checkpoint, output)
    (output / "config.json").unlink()
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(UserError, match="not an earlier export"):
        export(checkpoint, output, overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


BROKEN = {
    "another architecture": "model_type 'gpt2' in config.json: must be one of megadyn, qwen2, llama, mistral",
    "a missing shard": "model-00002-of-",
    "a truncated file": "model-00001-of-",
    "an empty index": "has no weight_map",
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder_is_one_sentence(exported: tuple[str, Path], tmp_path: Path, what: str) -> None:
    """For evaluation, and for a run that is to start from it: both open it so."""
    folder = shutil.copytree(exported[1], tmp_path / "broken")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    if what == "another architecture":
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    elif what == "a missing shard":
        second.unlink()
    elif what == "an empty index":
        (folder / "model.safetensors.index.json").write_text("{}")
    else:
        first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(UserError, match=BROKEN[what]) as caught:
        open_saved(folder)
    assert "\n" not in str(caught.value)


def test_missing_or_unexpected_tensor_is_named(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, losses = trained
    assert "has no tensor model.layers.2.mlp.up_proj.weight" in losses["missing"]
    assert "has a tensor that the model lacks: model.layers.0.extra.weight" in losses["unexpected"]
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_network(open_saved(folder / "missing"), torch.device("cpu"))
