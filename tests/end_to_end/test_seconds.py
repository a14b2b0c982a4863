"""A run that ends when its seconds are over, on all ranks after the same step."""

import time
from pathlib import Path

import pytest

from megadyn import pretrain
from megadyn.checkpoint import layout
from megadyn.config import load_config
from megadyn.errors import ConfigError
from megadyn.report.run import read_run
from tests.helpers.crew import Crew, last_step, lines, resumed_at

ENDLESS = ("training.iterations=100000", "training.eval_interval=0", "optimizer.schedule=constant")


def clocks_that_differ(rank: int) -> None:
    """Rank 0's clock runs at ten times the speed, and rank 1's, by which nobody may go, at forty times."""
    pretrain.time = Fast(time.perf_counter, 40 if rank else 10)


class Fast:
    def __init__(self, real, speed):
        self.real, self.speed = real, speed

    def perf_counter(self) -> float:
        return self.speed * self.real()


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("iteration-*"))


def run(config_file: Path, seconds: float, world: int = 2) -> Crew:
    crew = Crew(
        config_file, *ENDLESS, f"training.seconds={seconds}", world=world, sabotage=clocks_that_differ
    )
    assert crew.wait() == [0] * world, crew.output()
    return crew


def test_all_ranks_end_by_the_first_ones_clock_and_a_longer_run_goes_on(config_file, tmp_path):
    crew, out = run(config_file, 10), tmp_path / "out"
    end = last_step(out)
    assert f"(training.seconds = 10): the run ends at iteration {end}" in crew.output()
    checkpoint = newest(out)
    manifest = layout.read_manifest(checkpoint)
    assert manifest["iteration"] == end < 100000
    assert 10 <= manifest["seconds"] < 60
    evaluated = [line for line in lines(out) if "validation" in str(line) and line["iteration"] == end]
    assert evaluated, "the complete run is evaluated"
    (over,) = [line for line in lines(out) if "time_is_up" in line]
    assert (over["iteration"], over["time_is_up"]["seconds"]) == (end, manifest["seconds"])
    assert read_run(out, "run").notes == [
        f"The run ended at iteration {end:,}, when training.seconds were over."
    ]

    again = run(config_file, 10, world=1)
    assert f"nothing to do: the run is at iteration {end} of {end}" in again.output()
    longer = run(config_file, manifest["seconds"] + 3)
    assert resumed_at(longer.output()) == end
    later = layout.read_manifest(newest(out))
    assert later["iteration"] > end
    assert later["seconds"] >= manifest["seconds"] + 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.seconds=0"], "a finite number above 0"),
        (["training.seconds=9"], "optimizer.schedule = cosine, whose decay would begin at an unknown step"),
        (
            [
                "training.seconds=9",
                "optimizer.schedule=constant",
                "training.anneal={capacity: 1, iterations: 2, levels: 2}",
            ],
            "null with phases or training.anneal",
        ),
    ],
)
def test_what_cannot_end_so_is_refused(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, overrides)


def test_a_schedule_of_its_own_length_goes_with_seconds(config_file):
    config = load_config(config_file, ["training.seconds=9", "optimizer.schedule_tokens=1M"])
    assert config.training.seconds == 9
