"""What experiments of many runs share: runs that are stopped have no row, and end with the experiment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadyn.benchmark.experiments import records_of, start
from megadyn.errors import UserError

WAITS = "import pathlib, time; pathlib.Path({path!r}).touch(); time.sleep(60)"
EXPERIMENT = """
from megadyn.benchmark.experiments import end_runs_at_sigterm, start
end_runs_at_sigterm()
start(["-c", {run!r}])
"""


@pytest.mark.parametrize("validated", [[0], [0, 4], []])
def test_a_run_that_was_stopped_has_no_results(tmp_path: Path, validated: list[int]) -> None:
    """A run that is asked to stop saves and ends with status 0; its last validation may be that of the start."""
    records = [{"iteration": at, "validation": {"causal": 9.0}} for at in validated]
    records += [{"iteration": 4, "lm_loss": 5.0}, {"iteration": 5, "checkpoint": {}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match=f"the run in {tmp_path} was stopped before its end; start again"):
        records_of(tmp_path, 8)


def test_records_of_a_run_to_its_end(tmp_path: Path) -> None:
    records = [{"iteration": 8, "lm_loss": 5.0}, {"iteration": 8, "validation": {"causal": 4.0}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert records_of(tmp_path, 8) == (records[:1], records[1])


def test_a_run_that_fails_says_its_last_line() -> None:
    with pytest.raises(UserError, match="-c import sys; .*: no such thing"):
        start(["-c", "import sys; print('more'); sys.exit('first\\nerror: no such thing')"])


def test_an_experiment_that_is_ended_ends_its_runs(tmp_path: Path) -> None:
    there = tmp_path / "there"
    run = WAITS.format(path=str(there)) + f"  # {tmp_path}"
    experiment = subprocess.Popen([sys.executable, "-c", EXPERIMENT.format(run=run)])
    try:
        until(there.exists)
        assert processes_with(f"# {tmp_path}") - {experiment.pid}
        experiment.send_signal(signal.SIGTERM)
        assert experiment.wait(20) == 128 + signal.SIGTERM
        assert not processes_with(f"# {tmp_path}")
    finally:
        for process in processes_with(f"# {tmp_path}"):
            os.kill(process, signal.SIGKILL)
        experiment.wait()


def until(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_with(word: str) -> set[int]:
    """Processes with this word in their command line."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if word in command:
            found.add(int(folder.name))
    return found
