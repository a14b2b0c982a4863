"""What experiments of many runs share: runs that are stopped have no row; signals end the runs at work, and begin no others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megadyn.benchmark.experiments import has_diverged, records_of, run_python
from megadyn.errors import UserError
from tests.helpers.tiny import ROOT

RUN = """
import pathlib, signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as training does
    time.sleep(0.3)
    pathlib.Path(sys.argv[1] + "-saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1] + "-begun").touch()
time.sleep(60)
"""
EXPERIMENT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from megadyn.benchmark.experiments import end_runs_on_signals, run_python
end_runs_on_signals()
with ThreadPoolExecutor(2) as pool:
    for job in [pool.submit(run_python, ["-c", sys.argv[1], f"{sys.argv[2]}/{name}"]) for name in "abcd"]:
        job.result()
"""


def write_metrics(folder: Path, *records: dict, iterations: int = 8) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(f"training: {{iterations: {iterations}}}\n")


def step(iteration: int) -> dict:
    return {"iteration": iteration, "lm_loss": 5.0}


def validation(iteration: int) -> dict:
    return {"iteration": iteration, "validation": {"causal": 9.0}}


@pytest.mark.parametrize(
    "records",
    [
        [validation(0), step(4), {"iteration": 5, "checkpoint": {}}],
        [validation(0), step(4), validation(4)],
        [validation(0), step(8)],  # killed in the last validation
        [step(4)],
    ],
)
def test_a_run_that_was_stopped_has_no_results(tmp_path: Path, records: list[dict]) -> None:
    """A run that is asked to stop saves and ends with status 0; its last validation may be that of the start."""
    write_metrics(tmp_path, *records)
    with pytest.raises(UserError, match=f"the run in {tmp_path} has no validation after its last step"):
        records_of(tmp_path)


@pytest.mark.parametrize("iterations", [8, 100])
def test_records_of_a_run_to_its_end(tmp_path: Path, iterations: int) -> None:
    """The end may also be that of the run's time."""
    over = [{"iteration": 8, "time_is_up": {"seconds": 9.0}}] if iterations > 8 else []
    write_metrics(tmp_path, step(8), *over, validation(8), iterations=iterations)
    assert records_of(tmp_path) == ([step(8)], validation(8))


def test_a_run_that_diverged_is_told_from_one_that_failed_otherwise(tmp_path: Path) -> None:
    assert not has_diverged(tmp_path)  # no run at all
    write_metrics(tmp_path, validation(0), {"iteration": 3, "bad_step": {"action": "skip"}})
    assert not has_diverged(tmp_path)
    write_metrics(tmp_path, validation(0), {"iteration": 3, "diverged": {"problem": "a loss of nan"}})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iter')
    assert has_diverged(tmp_path)


def test_a_run_that_fails_says_its_last_line() -> None:
    with pytest.raises(UserError, match="-c import sys; .*: no such thing"):
        run_python(["-c", "import sys; print('more'); sys.exit('first\\nerror: no such thing')"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_lets_the_runs_at_work_save_and_begins_no_others(
    tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    """Also where the whole group gets the signal: a second one would end a run before it has saved."""
    command = [sys.executable, "-c", EXPERIMENT, RUN, str(tmp_path)]
    experiment = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    send(experiment.pid, number)
    _, said = experiment.communicate(timeout=60)
    assert experiment.returncode == 128 + number and said == "waiting for runs to save: 2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-begun", "a-saved", "b-begun", "b-saved"]


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
