"""Traces of a window of steps."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import profile as profiled

from megadyn.config import LoggingConfig
from megadyn.log import log
from megadyn.telemetry.profile import MemorySnapshot, Profile, Window, Windows


def run(profile: Window, steps: range) -> None:
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


@pytest.fixture
def history(monkeypatch) -> list[str]:
    """Stands in for a GPU's history of memory, which a CPU lacks; lists what is done with it."""
    done: list[str] = []

    def dump(path: str) -> None:
        done.append("write")
        Path(path).write_bytes(b"history")

    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all", stacks="all": done.append(f"record {enabled}"),
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return done


def test_memory_is_recorded_in_its_window_beside_a_trace(tmp_path, history):
    windows = Windows(config(memory_snapshot_steps=[3, 4]), tmp_path, 0, 0)
    ended = []
    for number in range(1, 6):
        windows.before_step(number)
        ended.append(windows.after_step(number))
    assert ended == [False, False, True, True, False]
    assert history == ["record all", "write", "record None"]
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert written == ["memory/rank0-steps3-4.pickle", "profile/rank0-steps2-3.json.gz"]


def test_a_run_that_runs_out_of_memory_keeps_the_history_so_far(tmp_path, history):
    snapshot = MemorySnapshot(config(memory_snapshot_steps=[2, 9]), tmp_path, 0, 0)
    run(snapshot, range(1, 4))
    snapshot.before_step(4)  # which does not end
    snapshot.finish(3)
    assert history == ["record all", "write", "record None"]
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["rank0-steps2-3.pickle"]


def test_memory_that_cannot_be_written_is_no_longer_recorded(tmp_path, history, monkeypatch, caplog):
    def dump(path: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    run(MemorySnapshot(config(memory_snapshot_steps=[1, 1]), tmp_path, 0, 0), range(1, 3))
    assert "the memory snapshot was not written: no space left" in caplog.text
    assert history == ["record all", "record None"]
