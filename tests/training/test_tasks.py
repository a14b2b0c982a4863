"""A run's evaluations on tasks, where the run goes back, and at a start that goes on from an earlier checkpoint."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megadyn.checkpoint import layout
from megadyn.config.phase import Phase
from megadyn.telemetry.telemetry import Silent
from megadyn.training import task_process, tasks
from megadyn.training.tasks import Tasks
from tests.helpers.crew import wait_until
from tests.helpers.tiny import tiny_config

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(1000)"]


class Told(Silent):
    def __init__(self) -> None:
        self.scores: dict[int, Any] = {}
        self.events: list[tuple[int, str]] = []

    def tasks(self, iteration: int, scores: Any) -> None:
        self.scores[iteration] = scores

    def event(self, iteration: int, name: str, what: Any) -> None:
        self.events.append((iteration, name))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tasks:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(tasks, "all_gather", lambda value: [value])
    monkeypatch.setattr(task_process, "command", lambda **asked: SLEEP)
    config = tiny_config("dense")
    config.output_dir = str(tmp_path)
    config.training.tasks.names, config.training.tasks.interval = ["t"], 10
    made = Tasks(config, SimpleNamespace())
    made.telemetry = Told()
    yield made
    made.close()


def checkpoint(made: Tasks, iteration: int, digest: str = "") -> Path:
    folder = made.root / layout.folder_name(iteration)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / layout.DIGEST).write_text(digest or f"of {iteration}")
    return folder


def marked(made: Tasks) -> list[int]:
    return sorted(layout.iteration_of(path.parent) for path in made.root.glob(f"*/{layout.EVALUATED}"))


def results(made: Tasks, iteration: int, digest: str) -> None:
    made.folder.mkdir(exist_ok=True)
    content = {"checkpoint": digest, "seconds": 1.0, "tasks": {"t": {"acc": 0.5}}}
    (made.folder / f"{layout.folder_name(iteration)}.json").write_text(json.dumps(content))


def test_a_run_that_goes_back_leaves_out_what_it_will_repeat(made: Tasks):
    made.saved(checkpoint(made, 10), is_last=False)
    made.saved(checkpoint(made, 15), is_last=False)  # not due
    made.saved(checkpoint(made, 20), is_last=False)
    assert marked(made) == [10, 20]
    made.go_back(10)
    assert marked(made) == [10] and made.telemetry.events == [(20, "tasks_left_out")]
    made.go_back(0)
    assert marked(made) == [] and made.telemetry.events[1:] == [(10, "tasks_left_out")]

    # One that waited begins if that before it ends or is left out.
    made.saved(checkpoint(made, 30), is_last=False)
    made.saved(checkpoint(made, 20), is_last=False)  # the run has gone back in between
    made.go_back(25)
    assert marked(made) == [20]
    assert made._left() == str(made.root / layout.folder_name(20))


def test_results_count_for_the_very_checkpoint_alone(made: Tasks, monkeypatch: pytest.MonkeyPatch):
    quick = [sys.executable, "-S", "-c", "print('done')"]
    monkeypatch.setattr(task_process, "command", lambda **asked: quick)
    made.saved(checkpoint(made, 10, "new"), is_last=False)
    results(made, 10, "old")
    wait_until(lambda: made.collect() or made.telemetry.events)
    assert made.telemetry.events == [(10, "tasks_failed")] and not made.telemetry.scores

    # A start goes on from 20: 30 lies on another way, 10 is marked, 20 has results that were not yet reported.
    for iteration in (10, 20, 30):
        (checkpoint(made, iteration) / layout.EVALUATED).touch()
    results(made, 20, "of 20")
    assert made.take_up(made.root / layout.folder_name(20), is_complete=False)
    assert marked(made) == [10, 20]
    results(made, 10, "of 10")
    wait_until(lambda: made.collect() or len(made.telemetry.scores) == 2)
    assert made.telemetry.scores == {20: {"t": {"acc": 0.5}}, 10: {"t": {"acc": 0.5}}}
    assert marked(made) == []
    assert not made.take_up(made.root / layout.folder_name(20), is_complete=True)


def test_what_is_said_before_the_metrics_are_open_is_in_them_later(made: Tasks):
    opened, made.telemetry = made.telemetry, Silent()
    made.saved(checkpoint(made, 10), is_last=False)
    made.go_back(0)
    assert not opened.events
    made.telemetry = opened
    made.collect()
    assert opened.events == [(10, "tasks_left_out")]


def test_a_run_without_tasks_holds_no_checkpoint_for_them(made: Tasks):
    (checkpoint(made, 10) / layout.EVALUATED).touch()
    made.is_wanted = False
    assert not made.take_up(None, is_complete=False)
    assert marked(made) == []


def test_scores_have_the_phase_of_their_checkpoint():
    phase = Phase("b", 2, 2, 4, 9, 9, 16, 4, {}, [["a", 4, 4, 8], ["b", 9, 4, 8]])
    assert [phase.name_at(at) for at in (4, 5, 9)] == ["a", "b", "b"]
