"""What a run of several ranks reports about itself, and what of that is refused."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest

from megadyn.engine.gradient_norms import COMPONENTS
from megadyn.engine.step_clock import PARTS
from megadyn.report.report import write_report
from tests.helpers.crew import Crew, lines
from tests.helpers.sabotage import slow_steps


def without_login(rank: int) -> None:
    """A home without an account."""
    import os
    import tempfile

    home = tempfile.mkdtemp()
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        os.environ.pop(name, None)
    os.environ |= {"HOME": home, "WANDB_CONFIG_DIR": home}


def test_a_run_reports_everything_where_it_was_asked_to(config_file: Path) -> None:
    crew = Crew(
        config_file,
        "parallel.pipeline=2",
        "logging.interval=2",
        "logging.csv=true",
        "logging.wandb=offline",
        "logging.profile_steps=[3,4]",
        "logging.profile_ranks=[0,1]",
        "logging.peak_tflops=1e-3",
        "optimizer.multipliers.router=3",
        "optimizer.name=muon",
        "optimizer.muon.multiplier=0.5",
        world=2,
        sabotage=without_login,
    )
    assert crew.wait() == [0, 0], crew.output()
    assert "optimizer: muon in fp32 (auto: precision = fp32), 14 matrices in this stage" in crew.output()
    out = config_file.parent / "out"
    steps = [line for line in lines(out) if "lm_loss" in line]
    assert [step["iteration"] for step in steps] == [2, 4, 6]
    for step in steps:
        assert tuple(step["grad_norms"]) == COMPONENTS and tuple(step["step_split_ms"]) == PARTS
        assert sum(norm**2 for norm in step["grad_norms"].values()) ** 0.5 == pytest.approx(
            step["grad_norm"], rel=1e-5
        )
        assert step["learning_rates"] == pytest.approx(
            {
                "base": step["learning_rate"],
                "prior": step["learning_rate"],
                "router": 3 * step["learning_rate"],
                "muon": step["learning_rate"] / 2,
            }
        )
        assert step["mfu_causal_half"] == pytest.approx(step["model_tflops"] / 1e-3)
        assert step["memory_gib"]["resident_peak"] > 0
    with (out / "metrics.csv").open() as file:
        rows = {(int(row["iteration"]), row["name"]): float(row["value"]) for row in csv.DictReader(file)}
    assert rows[6, "grad_norms/head"] == steps[-1]["grad_norms"]["head"]
    assert {at for at, name in rows if name == "validation/causal"} == {0, 3, 6}
    assert {path.name for path in (out / "profile").iterdir()} == {
        "rank0-steps3-4.json.gz",
        "rank1-steps3-4.json.gz",
    }
    (start,) = map(json.loads, (out / "environment.jsonl").read_text().splitlines())
    assert start["world"] == {"size": 2, "tensor": 1, "pipeline": 2, "data": 1, "zero": 1}
    assert list(start["hosts"].values()) == [2]
    assert len(list(out.glob("wandb/offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "logging.wandb=online",
            "logging.wandb = 'online': must be offline or none, or first run `wandb login`",
        ),
        (
            "logging.profile_steps=[7,9]",
            "logging.profile_steps = [7, 9]: must be steps of the run, which has 6",
        ),
        (
            "logging.memory_snapshot_steps=[2,3]",
            "logging.memory_snapshot_steps = [2, 3]: must be null on a CPU: torch records the memory of GPUs alone",
        ),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_sentence(
    config_file: Path, override: str, said: str
) -> None:
    crew = Crew(config_file, override, world=2, sabotage=without_login)
    assert crew.wait() == [2, 2]
    for rank in range(2):
        (error,) = crew.errors(rank)
        assert said in error
        assert "Traceback" not in crew.output(rank)
    assert not (config_file.parent / "out" / "metrics.jsonl").exists()


def test_ranks_that_there_are_not_trace_nothing(config_file: Path) -> None:
    crew = Crew(config_file, "logging.profile_steps=[1,2]", "logging.profile_ranks=[0,1]")
    assert crew.wait() == [2]
    assert "logging.profile_ranks = [0, 1]: must be below 1, the number of processes" in crew.output()


@pytest.mark.parametrize("slow_s", [0.1, 0.5])
def test_a_slowed_rank_is_named_within_20_steps_and_an_even_run_names_nobody(
    slow_s: float, config_file: Path, tmp_path: Path
) -> None:
    """Each rank is held up for at least 0.1 s per step, so that this machine's own unevenness is small beside it."""
    crew = Crew(
        config_file,
        "logging.interval=2",
        "logging.slow_rank_factor=2",
        "data.validation_fraction=0",
        "training.iterations=8",
        world=2,
        sabotage=partial(slow_steps, seconds=[0.1, slow_s]),
    )
    assert crew.wait() == [0, 0], crew.output()
    out = tmp_path / "out"
    found = [line for line in lines(out) if "slow_rank" in line]
    reports = [line for line in lines(out) if "lm_loss" in line]
    assert all(line["rank_time_ms"]["slowest"] >= line["rank_time_ms"]["median"] >= 100 for line in reports)
    if slow_s == 0.1:
        assert not found and "is slow" not in crew.output()
        return
    assert [line["slowest_rank"] for line in reports] == [1] * 4
    (named_in,) = found
    assert named_in["iteration"] == 8 and named_in["slow_rank"]["rank"] == 1
    (start,) = map(json.loads, (out / "environment.jsonl").read_text().splitlines())
    assert named_in["slow_rank"]["host"] == next(iter(start["hosts"]))
    assert f"rank 1 on {named_in['slow_rank']['host']} is slow: its own part of a step took" in crew.output()
    write_report([out], tmp_path / "report.html", tokens=0)
    page = (tmp_path / "report.html").read_text()
    assert "Own time of a rank in the reported step (ms)" in page
    assert "Warned in training: rank 1 on" in page
