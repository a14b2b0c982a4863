"""Traces of a window of steps."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import profile as profiled

from megadyn.config import LoggingConfig
from megadyn.log import log
from megadyn.telemetry.profile import Profile


def run(profile: Profile, steps: range) -> None:
    for number in steps:
        profile.before_step(number)
        torch.ones(3) @ torch.ones(3)
        profile.after_step(number)


def config(**fields) -> LoggingConfig:
    return LoggingConfig(**{"profile_steps": [2, 3], "profile_ranks": [0, 2]} | fields)


def test_the_steps_of_the_window_are_traced_once(tmp_path):
    profile = Profile(config(), tmp_path, 2, 0)
    run(profile, range(1, 6))
    run(profile, range(2, 6))  # after a rollback
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank2-steps2-3.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::dot" for event in events if event.get("cat") == "cpu_op") == 2


@pytest.mark.parametrize(("fields", "rank"), [({"profile_steps": None}, 0), ({}, 1)])
def test_others_trace_nothing(tmp_path, fields, rank):
    run(Profile(config(**fields), tmp_path, rank, 0), range(1, 6))
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_or_begins_inside_the_window_keeps_what_there_is(tmp_path):
    profile = Profile(config(profile_steps=[2, 9]), tmp_path, 0, 4)
    run(profile, range(5, 7))
    profile.finish(6)
    profile.finish(6)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank0-steps5-6.json.gz"]


def test_a_window_that_lies_behind_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    run(Profile(config(), tmp_path, 0, 3), range(4, 6))
    assert "no steps are traced: the run continues from iteration 3" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_stops_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    (tmp_path / "profile").write_text("a file")
    run(Profile(config(), tmp_path, 0, 0), range(1, 4))
    assert "the trace was not written" in caplog.text


def test_no_half_a_trace_is_left(tmp_path, monkeypatch, caplog):
    def export(trace, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(profiled, "export_chrome_trace", export)
    run(Profile(config(), tmp_path, 0, 0), range(1, 4))
    assert "no space left" in caplog.text
    assert not list((tmp_path / "profile").iterdir())
