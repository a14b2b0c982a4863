"""Muon's keys: given with another optimizer, or without sense, they are refused."""

from dataclasses import asdict
from pathlib import Path

import pytest

from megadyn.checkpoint.same_run import SAME_TRAINING, check_same_run
from megadyn.config import Config, engine_settings, load_config, save_config
from megadyn.errors import ConfigError, UserError
from tests.helpers.tiny import tiny_config

RUN = """
data: {train: corpus}
tokenizer: {path: byte}
training: {iterations: 10}
output_dir: out
"""


def load(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["optimizer.name=moun"],
            r"optimizer\.name = 'moun': must be one of adamw, muon \(did you mean 'muon'\?\)",
        ),
        (
            ["optimizer.muon.momentum=0.9"],
            r"optimizer\.muon\.momentum = 0\.9: must be left out with optimizer\.name = adamw, or set optimizer\.name=muon",
        ),
        (["optimizer.muon.multiplier=2"], r"optimizer\.muon\.multiplier = 2\.0: must be left out"),
        (["optimizer.name=muon", "optimizer.muon.momentum=1"], r"momentum = 1\.0: must be in \[0, 1\)"),
        (["optimizer.name=muon", "optimizer.muon.steps=0"], r"steps = 0: must be at least 1"),
        (
            ["optimizer.name=muon", "optimizer.muon.precision=fp16"],
            r"precision = 'fp16': must be one of auto, fp32, bf16",
        ),
        (
            ["optimizer.name=muon", "optimizer.muon.multiplier=0"],
            r"multiplier = 0\.0: must be a number above 0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, *words)


def test_a_saved_configuration_is_accepted_with_either(tmp_path: Path) -> None:
    """It holds Muon's keys at their defaults too."""
    for name in ("adamw", "muon"):
        config = load(tmp_path, f"optimizer.name={name}")
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml").optimizer == config.optimizer


@pytest.mark.parametrize(
    ("own", "run", "want"),
    [("auto", "bf16", "bf16"), ("auto", "fp16", "fp32"), ("auto", "fp32", "fp32"), ("bf16", "fp32", "bf16")],
)
def test_the_iteration_follows_the_runs_precision(own: str, run: str, want: str) -> None:
    config = tiny_config("dense")
    config.optimizer.muon.precision = own
    assert config.optimizer.muon.iterates_in(run) == want


def test_states_on_a_disk_are_refused(tmp_path: Path) -> None:
    settings = tmp_path / "engine.json"
    settings.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}')
    engine = f"deepspeed_config={settings}"
    assert engine_settings(load(tmp_path, engine))
    with pytest.raises(ConfigError, match="device = 'nvme': must be cpu or none with optimizer.name = muon"):
        engine_settings(load(tmp_path, engine, "optimizer.name=muon"))


# ---- going on from a checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize(("was", "now"), [("adamw", "muon"), ("muon", "adamw"), (None, "muon")])
def test_a_checkpoint_of_another_optimizer_is_refused_and_its_average_is_not(
    was: str | None, now: str
) -> None:
    config = tiny_config("dense")
    config.optimizer.name = now
    manifest = {
        "model": asdict(config.model),
        "training": {key: getattr(config.training, key) for key in SAME_TRAINING},
        **({"optimizer": was} if was else {}),
    }
    with pytest.raises(
        UserError, match=f"optimizer.name is '{was or 'adamw'}' in the checkpoint and '{now}' here"
    ):
        check_same_run(config, manifest, Path("there"))
    check_same_run(config, manifest | {"averaged": {}}, Path("there"))
    config.optimizer.name = was or "adamw"
    check_same_run(config, manifest, Path("there"))
