"""How a run goes on: from its own checkpoints or a fork, with other settings, or not at all."""

import json
import math
import signal
import subprocess
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from tests.end_to_end.test_deaths import ENDLESS, ranks_of
from tests.end_to_end.test_pretrain import DEEPSPEED, ENVIRONMENT
from tests.helpers.crew import Crew, last_step, lines, resumed_at, wait_until
from tests.helpers.sabotage import never_joined, spoiled_losses

QUIET = "data.validation_fraction=0"


def train(config_file: Path, *overrides: str, factors: dict[int, float] | None = None) -> Crew:
    """On one rank; the losses of its n-th step are multiplied by `factors[n]`."""
    crew = Crew(
        config_file, QUIET, *overrides, sabotage=partial(spoiled_losses, factors=factors) if factors else None
    )
    crew.statuses = crew.wait()
    return crew


def kept(out: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in out.glob("checkpoints/iteration-*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_counts_what_it_consumed_and_then_leaves_all_as_it_is(config_file: Path) -> None:
    """6 steps of 4 samples, then the other 24 of 48 in steps of 8, and a last start that finds nothing to do."""
    length = ("training.iterations=null", f"training.tokens={48 * 48}")
    first = train(config_file, "training.iterations=6")
    assert first.statuses == [0], first.output()
    second = train(
        config_file, *length, "training.global_batch_size=8", "model.routing.threshold_momentum=0.5"
    )
    assert second.statuses == [0], second.output()
    out = config_file.parent / "out"
    steps = [(line["iteration"], line["consumed_tokens"]) for line in lines(out) if "lm_loss" in line]
    assert steps[5:] == [(6, 24 * 48), (7, 32 * 48), (8, 40 * 48), (9, 48 * 48)]
    assert second.output().count("/9 ") >= 3  # progress, and so the time left, by the same count
    (resumed,) = [line["resumed"] for line in lines(out) if "resumed" in line]
    assert resumed["changed"]["model.routing.threshold_momentum"] == {"was": 0.9, "is": 0.5}
    assert resumed["changed"]["training.global_batch_size"] == {"was": 4, "is": 8}
    assert "model.routing.threshold_momentum was 0.9 and is 0.5" in second.output()
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["tokens"] == 48 * 48

    before = contents(out)
    third = train(
        config_file, *length, "training.global_batch_size=16", "model.routing.threshold_momentum=0.5"
    )
    assert third.statuses == [0]
    assert "nothing to do: the run is at iteration 9 of 9" in third.output()
    assert contents(out) == before


def test_a_fork_goes_on_from_its_own_and_can_go_back_once(config_file: Path) -> None:
    origin = config_file.parent / "origin"
    assert train(config_file, f"output_dir={origin}", "training.iterations=2").statuses == [0]
    out = config_file.parent / "out"
    fork = (f"checkpoint.resume={origin}", "checkpoint.interval=2", "checkpoint.keep=0")
    first = train(config_file, *fork, "training.iterations=4")
    assert resumed_at(first.output()) == 2 and "origin" in first.output()
    origin.rename(config_file.parent / "moved")  # what a run began with is not needed for ever
    second = train(config_file, *fork)
    assert (second.statuses, resumed_at(second.output())) == ([0], 4)
    assert kept(out) == [4, 6]

    back = (
        f"checkpoint.fork_from={out}/checkpoints/iteration-00000004",
        "checkpoint.interval=1",
        "checkpoint.keep=0",
    )
    assert resumed_at(train(config_file, *back, "training.iterations=5").output()) == 4
    assert resumed_at(train(config_file, *back).output()) == 5  # it has gone on from there
    assert (out / "checkpoints/latest").read_text().splitlines()[0] == "iteration-00000006"


def test_a_model_that_gives_nan_is_no_success_at_any_start(config_file: Path) -> None:
    """Bad steps that are skipped up to the end, with a checkpoint behind each."""
    settings = ("training.on_bad_step=skip", "checkpoint.interval=1", "training.max_bad_steps=4")
    bad = dict.fromkeys(range(3, 7), math.nan)
    first = train(config_file, *settings, factors=bad)
    assert first.statuses == [1]
    assert "the loss of the last step is nan" in first.errors()[0]
    out = config_file.parent / "out"
    assert kept(out) == [2, 5, 6]  # the newest two, and the newest good one
    manifest = json.loads((out / "checkpoints/iteration-00000006/manifest.json").read_text())
    assert (manifest["loss_rule"]["bad_in_a_row"], manifest["loss_rule"]["bad_steps"]) == (4, 4)

    second = train(config_file, *settings, factors=dict.fromkeys(range(1, 5), math.nan))
    assert second.statuses == [1]  # from the good one, through the same steps
    assert resumed_at(second.output()) == 2
    assert second.output().count("checkpoint skipped: ") == 2
    third = train(
        config_file, *settings, "training.max_bad_steps_total=2", factors=dict.fromkeys(range(1, 4), math.nan)
    )
    assert "3 of the run, more than training.max_bad_steps_total = 2" in third.errors()[0]
    last = train(config_file, *settings)  # and once the cause is gone, it is complete
    assert (last.statuses, resumed_at(last.output())) == ([0], 2)


def test_without_a_better_checkpoint_nan_stays_an_error(config_file: Path) -> None:
    settings = ("training.on_bad_step=skip", "training.iterations=2")
    assert train(config_file, *settings, factors={1: math.nan, 2: math.nan}).statuses == [1]
    again = train(config_file, *settings)
    assert again.statuses == [1]
    assert "is complete, but not good: the loss of the last step is nan" in again.errors()[0]


def test_the_last_update_counts_too(config_file: Path) -> None:
    """No training loss contains it, and there is no held-out set here."""
    rate = 1e12
    run = train(
        config_file,
        "training.iterations=1",
        f"optimizer.learning_rate={rate}",
        f"optimizer.min_learning_rate={rate}",
        "optimizer.warmup_iterations=0",
        "checkpoint.interval=1",
        "checkpoint.average={last: 2}",
    )
    assert run.statuses == [1], run.output()
    assert len(list(config_file.parent.glob("out/*/iteration-00000001/not-good"))) == 2  # its average too
    assert "the training loss (topk) is nan at the end of the run" in run.errors()[0]
    assert train(config_file, "training.iterations=1").statuses == [1]  # nor is it good at the next start


def test_a_rollback_passes_over_what_was_saved_among_bad_steps(config_file: Path) -> None:
    skip = (
        "training.on_bad_step=skip",
        "checkpoint.interval=1",
        "training.iterations=4",
        "checkpoint.keep=0",
    )
    assert train(config_file, *skip, factors={3: math.nan}).statuses == [0]
    out = config_file.parent / "out"
    (out / "checkpoints/latest").write_text("iteration-00000003\n")  # as if it had been killed there
    crew = train(
        config_file, "training.on_bad_step=rollback", "checkpoint.interval=10", factors={2: math.nan}
    )
    assert crew.statuses == [0], crew.output()
    assert resumed_at(crew.output()) == 2
    assert "step 4 (samples 12 to 15) is bad" in crew.output() and "back to iteration 2" in crew.output()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "model.routing.kind=mod",
            "model.routing.kind is 'dtf' in the checkpoint and 'mod' here (it determines the layers",
        ),
        ("training.seed=5", "training.seed is 1234 in the checkpoint and 5 here (it determines the order"),
    ],
)
def test_what_must_be_equal_is_refused_with_the_reason(override: str, said: str, config_file: Path) -> None:
    assert train(config_file, "training.iterations=1").statuses == [0]
    crew = train(config_file, override)
    assert crew.statuses == [2]
    assert said in crew.errors()[0]


def test_two_runs_in_one_folder_cannot_be(config_file: Path) -> None:
    out = config_file.parent / "out"
    first = Crew(config_file, *ENDLESS)
    wait_until(lambda: last_step(out) >= 1)
    (config_file.parent / "second").mkdir()
    other = config_file.parent / "second/config.yaml"
    other.write_text(config_file.read_text())
    second = Crew(other, *ENDLESS, "parallel.tensor=2", world=2)
    assert second.wait() == [2, 2]
    for rank in range(2):
        assert f"{out} is in use by another run (process {first.ranks[0].pid} on " in second.errors(rank)[0]
    first.signal(0, signal.SIGTERM)
    assert first.wait() == [0], first.output()
    assert not list(out.glob("*.lock"))


def test_a_rank_that_waits_for_another_ends_with_its_launcher(config_file: Path) -> None:
    launcher = subprocess.Popen(["sleep", "3600"])
    crew = Crew(config_file, world=2, sabotage=partial(never_joined, launcher=launcher.pid))
    try:
        wait_until(
            lambda: crew.logs[0].exists() and "device: cpu" in crew.output()
        )  # the last line before they meet
        assert crew.ranks[0].is_alive()
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not crew.ranks[0].is_alive(), 10)
    assert crew.end_after(0)[0] == 1
    assert crew.errors() == [f"error: the launcher (sleep, process {launcher.pid}) is gone"]


def test_ranks_end_with_their_launcher(config_file: Path) -> None:
    """`deepspeed` runs as two processes above the ranks. The upper one does not pass a signal on, so the ranks' parent lives."""
    out = config_file.parent / "out"
    with (config_file.parent / "log").open("w") as log:
        process = subprocess.Popen(
            [*DEEPSPEED, str(config_file), *ENDLESS, "parallel.tensor=2"],
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
    ranks: dict[int, psutil.Process] = {}
    try:
        wait_until(lambda: last_step(out) >= 1, 120)
        ranks = ranks_of(process.pid, config_file)
        assert len(ranks) == 2
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(ranks.values(), timeout=60)
        assert not alive
    finally:
        process.kill()
        process.wait()
        for rank in ranks.values():
            if rank.is_running():
                rank.kill()
    said = (config_file.parent / "log").read_text()
    assert "stopped by the end of its launcher (" in said, said
    assert not (out / "run.lock").exists()
    last = last_step(out)
    assert (out / f"checkpoints/iteration-{last:08d}/manifest.json").exists()  # nothing was lost
