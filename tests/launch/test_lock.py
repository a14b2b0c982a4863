"""One run per output folder: the lock names its holder, outlives no run, and cannot be held twice."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megadyn.errors import UserError
from megadyn.launch import lock
from megadyn.launch.lock import NAME, Holder, RunLock
from megadyn.launch.processes import process_start

ELSEWHERE = Holder("far-away", "another machine", 7, "1", "2026-01-01T00:00:00Z", "theirs")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"STALE_S": 0.6, "ENDING_S": 0.2, "POLL_S": 0.02}.items():
        monkeypatch.setattr(lock, name, seconds)


def write(folder: Path, holder: Holder) -> None:
    (folder / NAME).write_text(json.dumps(asdict(holder)))


def of_process(pid: int) -> Holder:
    return replace(
        RunLock(Path("unused")).me, pid=pid, process_start=process_start(pid) or "gone", token="theirs"
    )


def test_a_living_holder_is_named_and_stays(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    with pytest.raises(UserError, match=rf"is in use by another run \(process {os.getpid()} on .*, since 20"):
        second.take()
    second.release()  # not its own
    assert json.loads((tmp_path / NAME).read_text())["token"] == first.me.token
    first.release()
    second.take()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_holder_that_died_here_is_known_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write(tmp_path, of_process(process.pid))
    with pytest.raises(UserError, match=f"process {process.pid} on"):
        RunLock(tmp_path).take()
    process.kill()  # a zombie until it is waited for: dead all the same
    time.sleep(0.1)
    mine = RunLock(tmp_path)
    mine.take()
    process.wait()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path: Path) -> None:
    write(tmp_path, replace(of_process(os.getpid()), process_start="12"))
    RunLock(tmp_path).take()


def test_one_that_is_just_ending_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ENDING_S", 20)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    write(tmp_path, of_process(process.pid))
    threading.Thread(target=process.wait).start()
    RunLock(tmp_path).take()


@pytest.mark.parametrize("content", [json.dumps(asdict(ELSEWHERE)), "", "{}"])
def test_one_elsewhere_is_dead_once_its_lock_is_stale(content: str, tmp_path: Path) -> None:
    """Also one that was killed between making the file and writing into it."""
    (tmp_path / NAME).write_text(content)
    began = time.monotonic()
    RunLock(tmp_path).take()
    assert time.monotonic() - began > 0.5


def test_one_elsewhere_that_renews_its_lock_lives(tmp_path: Path) -> None:
    write(tmp_path, ELSEWHERE)
    renewing = threading.Timer(0.2, os.utime, [tmp_path / NAME])
    renewing.start()
    with pytest.raises(UserError, match="process 7 on far-away, since 2026-01-01"):
        RunLock(tmp_path).take()
    assert json.loads((tmp_path / NAME).read_text())["token"] == "theirs"


def test_of_many_starts_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a dead run's lock, where each would take it away."""
    monkeypatch.setattr(lock, "ENDING_S", 0.05)
    for _ in range(10):
        write(tmp_path, replace(of_process(os.getpid()), process_start="12"))
        locks, won = [RunLock(tmp_path) for _ in range(8)], []

        def start(mine: RunLock, won: list[RunLock] = won) -> None:
            try:
                mine.take()
            except UserError:
                return
            won.append(mine)

        threads = [threading.Thread(target=start, args=[mine]) for mine in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for mine in won:
            mine.renew()
        assert [mine.problem for mine in won].count(None) == 1
        next(mine for mine in won if mine.problem is None).release()
        assert not list(tmp_path.iterdir())


def test_a_run_whose_lock_is_in_other_hands_says_so(tmp_path: Path) -> None:
    mine = RunLock(tmp_path)
    mine.take()
    mine.renew()
    assert mine.problem is None
    (tmp_path / NAME).unlink()  # by hand
    mine.renew()
    assert mine.problem is None and (tmp_path / NAME).exists()
    write(tmp_path, ELSEWHERE)
    mine.renew()
    assert mine.problem is not None and "taken over by another run (process 7 on far-away" in mine.problem
    mine.release()
    assert (tmp_path / NAME).exists()
