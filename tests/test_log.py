"""The logger of the tools."""

import io
import sys

from megadyn.log import log, start_logging


def test_lines_follow_a_standard_output_that_was_replaced(monkeypatch):
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", first)
    start_logging()
    log.info("one")
    first.close()
    monkeypatch.setattr(sys, "stdout", second)
    log.info("two")
    assert second.getvalue() == "two\n"
