"""A run with Muon: what it reports, and where it may go on."""

from pathlib import Path

import pytest

from megadyn.checkpoint.merge import ShardedTensors
from megadyn.parallel.sharding import kind_of
from tests.helpers.crew import Crew, lines, resumed_at

SETTINGS = ["checkpoint.interval=1", "checkpoint.average.last=2", "data.validation_fraction=0"]


def test_a_run_with_muon_goes_on_and_its_average_with_another_optimizer(
    config_file: Path, tmp_path: Path
) -> None:
    out, muon = tmp_path / "out", ["optimizer.name=muon", "optimizer.muon.multiplier=0.5"]
    crew = Crew(config_file, *SETTINGS, *muon, "training.iterations=2")
    assert crew.wait() == [0], crew.output()
    assert "optimizer: muon in fp32 (auto: precision = fp32), 28 matrices in this stage" in crew.output()
    (*_, step) = (line for line in lines(out) if "lm_loss" in line)
    assert step["learning_rates"]["muon"] == pytest.approx(step["learning_rate"] / 2)
    assert step["learning_rates"]["base"] == pytest.approx(step["learning_rate"])

    saved = ShardedTensors(out / "checkpoints/iteration-00000002", "optimizer").names()
    momenta = {name.removesuffix("/momentum") for name in saved if name.endswith("/momentum")}
    assert len(momenta) == 28 and not any(f"{name}/exp_avg" in saved for name in momenta)
    assert all(kind_of(name) in ("column", "row", "kv") for name in momenta)

    crew = Crew(config_file, *SETTINGS, *muon, "training.iterations=3", "parallel.tensor=2", world=2)
    assert crew.wait() == [0, 0], crew.output()
    assert resumed_at(crew.output()) == 2

    other = [f"output_dir={tmp_path}/other", f"checkpoint.fork_from={out}/averages", "training.iterations=4"]
    crew = Crew(config_file, *SETTINGS, *other)
    assert crew.wait() == [0], crew.output()
    assert lines(tmp_path / "other")[-1]["iteration"] == 4
