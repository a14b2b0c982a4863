import logging
import sys
import time

import pytest

from megadyn.log import log
from megadyn.prepare.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("megadyn.progress.time.monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_where_there_is_no_terminal(clock, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="megadyn")
    with Progress(40_000_000) as progress:
        for seconds in (0.0, 4.0, 9.0, 10.0, 15.0):
            clock[0] = 100.0 + seconds
            progress.add(2_000_000, 5_000_000)
            progress.show()
    assert caplog.messages == [" 20 %, 0.8 MB/s, 2.0M tokens/s, 40s left"]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("megadyn.progress.BAR_AFTER_SECONDS", 0.0)
    with Progress(40_000_000) as progress:
        progress.add(20_000_000, 5_000_000)
        time.sleep(0.21)  # between two pictures
        progress.show()
    shown = capsys.readouterr().err
    assert " 50%" in shown
    assert "20.0M/40.0M" in shown
    assert "M tokens/s" in shown
