"""The benchmark of checkpoints, in a process of its own: it joins a process group."""

import contextlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megadyn.benchmark import checkpoint
from megadyn.errors import UserError, run_tool
from tests.helpers.crew import METHOD
from tests.helpers.tiny import ROOT

SMALL = [
    f"--{name}={value}"
    for name, value in (
        ("hidden", 32),
        ("layers", 2),
        ("heads", 4),
        ("kv-heads", 2),
        ("ffn", 64),
        ("vocab", 61),
        ("sequence", 24),
        ("batch", 2),
        ("rounds", 2),
        ("warmup", 1),
        ("deepspeed-config", ROOT / "ds_configs/zero1.json"),
    )
]


def run(arguments, output, sabotage=None):
    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if sabotage:
            sabotage()
        os._exit(finish(file, run_tool(lambda: checkpoint.main(arguments))))


def finish(file, status):
    file.flush()
    return status


def spoil_restoring():
    """As if a restored engine missed what was read."""
    checkpoint.save_load.load = lambda engine, folder: None


def no_room():
    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda folder: usage(0, 0, 1000)


def outcome(tmp_path: Path, *extra, sabotage=None):
    work = tmp_path / "work"
    work.mkdir()
    process = METHOD.Process(
        target=run, args=([*SMALL, f"--folder={work}", "--json", *extra], tmp_path / "output", sabotage)
    )
    process.start()
    process.join(120)
    assert not list(work.iterdir()), "something was left behind"
    return process.exitcode, (tmp_path / "output").read_text().strip().splitlines()


def test_saving_both_ways_verifying_and_restoring_are_timed(tmp_path):
    status, lines = outcome(tmp_path)
    assert status == 0, lines
    found = json.loads(lines[-1])
    assert found["bytes"] == 12 * found["parameters"]  # a weight and two moments in fp32
    for way in ("waiting", "background"):
        assert 0 < found[way]["copy"] <= found[way]["stall"]
        assert found[way]["write"] > 0
    assert found["waiting"]["stall"] >= found["waiting"]["write"]
    assert found["waiting"]["step_beside"] is None
    assert found["verify"] > 0 < found["restore"]
    assert any(line.startswith("| in the background |") for line in lines)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [(spoil_restoring, "differs from what was saved"), (no_room, "two checkpoints need")],
)
def test_what_went_wrong_is_told(tmp_path, sabotage, message):
    status, lines = outcome(tmp_path, sabotage=sabotage)
    assert status == 2
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        checkpoint.main([*SMALL, f"--folder={tmp_path}/missing"])
