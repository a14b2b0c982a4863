"""Losses that are no number or far too high: the run stops, skips or goes back, as configured, and says so."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.crew import Crew, lines
from tests.helpers.sabotage import spoiled_losses


def run(config_file: Path, *overrides: str, factors: dict[int, float], world: int = 1) -> Crew:
    crew = Crew(
        config_file,
        "data.validation_fraction=0",
        *overrides,
        world=world,
        sabotage=partial(spoiled_losses, factors=factors),
    )
    crew.statuses = crew.wait()
    return crew


def events(config_file: Path) -> list[tuple[int, dict[str, Any]]]:
    return [
        (line["iteration"], line["bad_step"])
        for line in lines(config_file.parent / "out")
        if "bad_step" in line
    ]


def steps(config_file: Path) -> list[tuple[int, int]]:
    """(iteration, samples consumed) of the train lines."""
    return [
        (line["iteration"], line["consumed_samples"])
        for line in lines(config_file.parent / "out")
        if "lm_loss" in line
    ]


def test_stop_is_one_sentence_and_leaves_what_was_saved(config_file: Path) -> None:
    crew = run(config_file, "checkpoint.interval=2", "parallel.tensor=2", factors={4: math.nan}, world=2)
    assert crew.statuses == [1, 1]
    assert crew.errors(0) == [
        "error: step 4 (samples 12 to 15) is bad: a loss of nan; the step was not applied, and nothing was "
        "saved since iteration 2 (training.on_bad_step: skip or rollback continues)"
    ]
    assert crew.errors(1) == []
    assert "Traceback" not in crew.output(0) + crew.output(1)
    folders = config_file.parent / "out/checkpoints"
    assert {path.name for path in folders.iterdir()} == {"iteration-00000002", "latest"}
    problem = crew.errors(0)[0].removeprefix("error: ")
    assert lines(config_file.parent / "out")[-1] == {"iteration": 4, "diverged": {"problem": problem}}


def test_skip_passes_over_the_samples_and_counts(config_file: Path) -> None:
    crew = run(
        config_file,
        "training.on_bad_step=skip",
        "parallel.pipeline=2",
        factors={2: math.inf, 4: math.nan},
        world=2,
    )
    assert crew.statuses == [0, 0], crew.output(0)
    assert [
        (at, event["action"], event["problem"], event["bad_steps"]) for at, event in events(config_file)
    ] == [(2, "skip", "a loss of inf", 1), (4, "skip", "a loss of nan", 2)]
    assert steps(config_file) == [(1, 4), (3, 12), (5, 20), (6, 24)]
    manifest = json.loads(
        (config_file.parent / "out/checkpoints/iteration-00000006/manifest.json").read_text()
    )
    assert manifest["optimizer_steps"] == 4
    assert manifest["loss_rule"]["bad_steps"] == 2


def test_rollback_goes_on_with_the_samples_after(config_file: Path) -> None:
    crew = run(
        config_file,
        "training.on_bad_step=rollback",
        "checkpoint.interval=2",
        "checkpoint.background=true",
        factors={4: math.nan},
    )
    assert crew.statuses == [0], crew.output(0)
    ((at, event),) = events(config_file)
    assert (at, event["iteration"], event["action"], event["consumed_samples"]) == (2, 4, "rollback", 16)
    # Step 3 is done again, on samples 16 to 19 instead of 8 to 11; no line tells of the step that was undone.
    assert steps(config_file) == [(1, 4), (2, 8), (3, 20), (4, 24), (5, 28), (6, 32)]
    assert "back to iteration 2" in crew.output(0)


def test_rollback_without_a_checkpoint_stops(config_file: Path) -> None:
    crew = run(config_file, "training.on_bad_step=rollback", "checkpoint.interval=5", factors={3: math.nan})
    assert crew.statuses == [1]
    assert "there is no good checkpoint to go back to" in crew.errors()[0]


def test_a_spike_is_skipped_and_the_median_survives_a_restart(config_file: Path) -> None:
    rule = ("training.on_bad_step=skip", "training.spike_factor=1.5", "training.spike_window=2")
    crew = run(config_file, *rule, "training.iterations=2", factors={1: 1.0})
    assert crew.statuses == [0], crew.output(0)
    # the third step of all: only the checkpoint can know the two
    crew = run(config_file, *rule, factors={1: 1.6})
    assert crew.statuses == [0], crew.output(0)
    ((at, event),) = events(config_file)
    assert at == 3
    assert ", above 8." in event["problem"]


def test_a_step_with_a_large_gradient_is_skipped(config_file: Path) -> None:
    # The corpus is this project's code, so norms change with it: the factor leaves room for those of ordinary steps.
    rule = ("training.on_bad_step=skip", "training.norm_spike_factor=5", "training.spike_window=3")
    crew = run(config_file, *rule, factors={5: 40.0})
    assert crew.statuses == [0], crew.output(0)
    ((at, event),) = events(config_file)
    assert at == 5
    assert event["problem"].startswith("a gradient norm of ")


def test_too_many_bad_steps_stop_the_run(config_file: Path) -> None:
    crew = run(
        config_file,
        "training.on_bad_step=skip",
        "training.max_bad_steps=2",
        "checkpoint.interval=1",
        factors={2: math.nan, 4: math.nan, 5: math.nan, 6: math.nan},
    )
    assert crew.statuses == [1]  # a checkpoint after each step does not start the count anew
    crew = run(
        config_file,
        "training.on_bad_step=skip",
        "training.max_bad_steps=2",
        "training.iterations=12",
        factors=dict.fromkeys(range(1, 4), math.nan),
    )
    assert crew.statuses == [1]
    assert "3 in a row, more than training.max_bad_steps = 2" in crew.errors()[0]


def test_weights_that_overflow_are_never_saved(config_file: Path) -> None:
    """A step of finite loss and gradient can still do it: the first one here."""
    crew = run(
        config_file,
        "optimizer.learning_rate=3.0e38",
        "optimizer.warmup_iterations=0",
        "optimizer.weight_decay=10",
        "checkpoint.interval=1",
        factors={},
    )
    assert crew.statuses == [1]
    assert "is NaN or infinite at iteration 1: nothing was saved" in crew.errors()[0]
    problem = crew.errors()[0].removeprefix("error: ")
    assert lines(config_file.parent / "out")[-1] == {"iteration": 1, "diverged": {"problem": problem}}
    assert not list((config_file.parent / "out").glob("checkpoints/iteration-*"))


@pytest.mark.parametrize("zero", [0, 3])
def test_diverged_weights_are_never_saved(zero: int, config_file: Path) -> None:
    crew = run(
        config_file,
        "optimizer.learning_rate=1e30",
        "optimizer.warmup_iterations=0",
        "checkpoint.interval=1",
        "checkpoint.keep=0",
        f"deepspeed_config=ds_configs/zero{zero}.json",
        factors={},
    )
    assert crew.statuses == [1]
    assert crew.errors()[0].startswith("error: step 2 (samples 4 to 7) is bad: a ")
    shards = list((config_file.parent / "out/checkpoints").glob("*/weights-*"))
    assert shards
    for shard in shards:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(shard).values()), shard
