"""Bars and lines of long work, and that neither touches standard output."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from megadyn import progress
from megadyn.commands import main, run_command
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.log import log, start_logging
from megadyn.progress import BYTES, Bar, each, has_bars, waiting


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    start_logging(stream="stderr")
    return now


def be_on_a_terminal(monkeypatch):
    """Not a fixture: before the test itself, pytest puts another standard error in place. Bars stand at once."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "BAR_AFTER_SECONDS", 0.0)
    monkeypatch.delenv("RANK", raising=False)


def test_without_a_terminal_a_line_comes_every_ten_seconds_at_most(clock, capsys):
    with Bar("copying", 4000, BYTES) as bar:
        for seconds in range(0, 40, 2):
            clock[0] = 100.0 + seconds
            bar.add(200)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["copying: 30 %", "copying: 55 %", "copying: 80 %"]
    assert lines[0] == "copying: 30 %, 0.0 MB/s, 23s left"


def test_short_work_says_nothing(clock, capsys):
    assert list(each("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_with_the_time_left(monkeypatch, capsys):
    be_on_a_terminal(monkeypatch)
    with Bar("copying", 4_000_000, BYTES) as bar:
        bar.add(1_000_000)
        time.sleep(0.21)
        bar.reach(2_000_000, "as planned")
    out, shown = capsys.readouterr()
    assert out == ""
    assert "copying:  50%" in shown and "2.00M/4.00M" in shown and "as planned" in shown
    for _ in each(range(3), "tensors", 3):
        time.sleep(0.11)
    shown = capsys.readouterr().err
    assert "tensors:" in shown and " left" in shown


def test_other_ranks_and_threads_and_those_beside_a_live_view_have_no_bars(monkeypatch):
    be_on_a_terminal(monkeypatch)
    assert has_bars()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(has_bars()))
    thread.start()
    thread.join()
    assert seen == [False]
    progress.taken.set()
    try:
        assert not has_bars()
    finally:
        progress.taken.clear()
    monkeypatch.setenv("RANK", "1")
    assert not has_bars()


def test_work_that_tells_nothing_is_said_to_go_on(monkeypatch, capsys):
    start_logging(stream="stderr")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with waiting("merging"):
        time.sleep(0.2)
    said = capsys.readouterr().err.splitlines()
    assert said and set(said) == {"merging: 0s so far"}
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_tool_logs_to_standard_error_or_nowhere_if_it_has_none(capsys, monkeypatch):
    assert run_command(lambda: log.info("looking")) == 0
    assert capsys.readouterr() == ("", "looking\n")
    monkeypatch.setattr(sys, "stderr", None)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_command(lambda: log.info("looking")) == 0
    assert out.getvalue() == ""


def test_stages_go_to_standard_error_and_the_result_to_standard_output(tmp_path, capsys):
    for name in "ab":
        with IndexedWriter(tmp_path / name, "uint16") as writer:
            writer.add(np.array([1, 2, 3]), [3], [1])
            writer.finish()
    inputs = [str(tmp_path / name) for name in "ab"]
    assert main(["merge", "--inputs", *inputs, "--output-prefix", str(tmp_path / "all"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["tokens"] == 6
    assert len(out.splitlines()) == 2
    assert err == "opening 2 datasets\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "--checkpoint", "x", "--data", "y"], "loading torch"),
        (["benchmark", "step"], "loading the benchmark"),
    ],
)
def test_a_command_speaks_before_it_imports_torch(words, said):
    code = f"import sys; sys.modules['torch'] = None; from megadyn.commands import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[0] == said
    assert "import of torch halted" in done.stderr


@pytest.mark.parametrize(
    "variable", ["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"], ids=lambda name: name.lower()
)
def test_the_main_job_speaks_before_it_imports_torch_from_its_first_process(variable):
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('megadyn.pretrain', run_name='__main__')"
    for rank, said in (("0", "loading torch and DeepSpeed\n"), ("1", "")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, variable: rank},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == said
        assert "'torch.distributed'" in done.stderr
