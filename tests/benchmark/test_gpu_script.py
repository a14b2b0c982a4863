"""benchmarks/gpu.sh with a `python` that only says what it was asked: which tables a call makes, what it leaves, and whether the
benchmarks that it asks for run."""

import os
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from megadyn.commands.benchmark import BENCHMARKS
from tests.helpers.tiny import ROOT

NAMES = [
    *("kernels", "bytes", "step-3b", "step-3b-torch", "layer", "layer-torch"),
    *("step", "step-8k", "step-7b", "tests", "checkpoint", "scaling"),
]
STARTS_PROCESSES = ("checkpoint", "scaling")
"""Benchmarks that have a trial of their own, in the tests beside this one."""


@pytest.fixture
def call(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/python"
    stub.write_text(
        '#!/bin/sh\necho "asked: $*"\ncase "$*" in *${BROKEN:-nothing}*) echo why >&2; exit 1;; esac\n'
    )
    stub.chmod(0o755)
    environment = {
        "PATH": f"{stub.parent}:{os.environ['PATH']}",
        "FOLDER": str(tmp_path / "out"),
        "TRIAL": "1",
    }

    def run(*names: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "benchmarks/gpu.sh"), *names],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )

    run.made = lambda: sorted(path.name.split("-gpu-")[1] for path in (tmp_path / "out").glob("*"))
    return run


def test_named_tables_are_made_with_their_commands(call, tmp_path):
    assert call("bytes", "kernels").returncode == 0
    assert call.made() == ["bytes.md", "kernels.md"]
    (table,) = (tmp_path / "out").glob("*bytes.md")
    assert "python tools/benchmark.py bytes --models dense" in table.read_text()
    assert "asked: tools/benchmark.py bytes --models dense" in table.read_text()


def test_a_wrong_name_is_an_error_that_lists_the_names(call, tmp_path):
    done = call("bytes", "step-4b")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no table step-4b; there are: {' '.join(NAMES)}\n"
    assert not (tmp_path / "out").exists()


def test_a_call_makes_seven_tables_and_the_next_one_goes_on(call):
    assert call().returncode == 3
    assert call.made() == sorted(f"{name}.md" for name in NAMES[:7])
    assert call().returncode == 0
    assert call.made() == sorted(f"{name}.md" for name in NAMES)


def test_a_failing_table_leaves_its_message_and_is_made_by_the_next_call(call, tmp_path):
    done = call("layer", "checkpoint", BROKEN="checkpoint")
    assert (done.returncode, done.stderr) == (1, "why\n")
    assert call.made() == ["checkpoint.failed.txt", "layer.md"]
    (message,) = (tmp_path / "out").glob("*.txt")
    assert message.read_text().endswith("why\n")
    assert call("layer", "checkpoint").returncode == 0
    assert call.made() == ["checkpoint.md", "layer.md"]


def test_a_trial_names_its_folder(call):
    done = call("bytes", FOLDER="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: TRIAL=1 needs FOLDER=DIR")


def test_without_a_gpu_nothing_is_measured(call, tmp_path):
    done = call("layer", TRIAL="", BROKEN="cuda")
    assert done.returncode == 2
    assert "error: no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def benchmarks(call, folder: Path, **more: str) -> list[list[str]]:
    """The name and the options of each benchmark that the script starts."""
    while call(**more).returncode == 3:
        pass
    asked = [path.read_text().split("asked: ")[1].split() for path in sorted(folder.glob("*.md"))]
    assert len(asked) == len(NAMES)
    found = [words[1:] for words in asked if words[0] == "tools/benchmark.py"]
    assert len(found) == len(NAMES) - 2  # the others run pytest
    return found


@pytest.mark.parametrize("trial", ["", "1"])
def test_every_benchmark_knows_its_options(trial, call, tmp_path):
    for name, *options in benchmarks(call, tmp_path / "out", TRIAL=trial):
        import_module(BENCHMARKS[name]).parse_args(options)


def test_every_benchmark_of_a_trial_runs(call, tmp_path, capsys):
    """In this process, in bf16: what takes minutes with a process for each takes seconds."""
    for name, *options in benchmarks(call, tmp_path / "out"):
        if name not in STARTS_PROCESSES:
            import_module(BENCHMARKS[name]).main(options)
            assert "\n|---" in capsys.readouterr().out, (name, options)
