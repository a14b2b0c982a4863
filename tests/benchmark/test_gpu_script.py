"""benchmarks/gpu.sh with a `python` that only says what it was asked: which tables a call makes, what it leaves, and whether the
benchmarks that it asks for run. Those that start processes run through the script, where few packages are installed."""

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from megadyn.commands.benchmark import BENCHMARKS
from tests.helpers.tiny import ROOT

NAMES = [
    *("kernels", "step-3b", "step-3b-dtf", "engine", "step", "step-8k", "generate"),
    *("checkpoint", "engine-7b", "step-3b-torch", "layer", "layer-torch", "bytes", "step-7b"),
    *("tests", "scaling"),
]
SCRIPT = ROOT / "benchmarks/gpu.sh"
STARTS_PROCESSES = ("engine", "engine-7b", "checkpoint", "scaling")
"""Tables whose commands start processes."""
HOST = ["torch", "triton", "transformers", "pytest"]
"""Packages that a bare host has, with those that they require."""
PACKAGES = " ".join(re.findall(r'^packages="(?:\$packages )?(.*)"$', SCRIPT.read_text(), re.M)).split()
"""Modules that the script asks for first."""


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
            ["bash", str(SCRIPT), *names],
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
    assert call().returncode == 3
    assert call.made() == sorted(f"{name}.md" for name in NAMES[:14])
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


def test_a_table_that_takes_too_long_has_failed_and_says_so(call, tmp_path):
    slow = tmp_path / "bin/timeout"
    slow.write_text('#!/bin/sh\necho "$*" | grep -q "^-k 10 480 python " && exit 124\n')
    slow.chmod(0o755)
    done = call("layer")
    assert (done.returncode, done.stderr) == (1, "error: table layer took longer than 480 s\n")
    assert call.made() == ["layer.failed.txt"]


def test_a_table_names_the_card(call, tmp_path):
    """Here what the stub was asked for it."""
    call("layer", TRIAL="")
    (table,) = (tmp_path / "out").glob("*layer.md")
    assert "\nOn asked: -c import torch; p = torch.cuda.get_device_properties(0)" in table.read_text()


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
    asked = [path.read_text().split("asked: ")[-1].split() for path in sorted(folder.glob("*.md"))]
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


def link_packages(names: list[str], site: Path, *, with_required: bool) -> None:
    """Links the installed packages, and perhaps all that they require, into `site`."""
    todo, found = list(names), set()
    while todo:
        if (name := re.sub(r"[-_.]+", "-", todo.pop()).lower()) in found:
            continue
        found.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system
            continue
        for top in {str(file).split("/")[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
        if with_required:
            todo += [
                re.match(r"[\w.-]+", need)[0] for need in package.requires or () if "extra ==" not in need
            ]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python without packages, at BARE."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    return {
        "BARE": str(site),
        "PATH": f"{tmp_path}/bare/bin:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }


@pytest.mark.parametrize(("trial", "lacks"), [("1", "einops, psutil"), ("", "einops, psutil, triton")])
def test_packages_that_are_missing_are_named_before_anything_starts(trial, lacks, call, bare, tmp_path):
    for name in set(PACKAGES) - {"einops", "psutil"}:
        (Path(bare["BARE"]) / f"{name}.py").touch()
    done = call("bytes", TRIAL=trial, **bare)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: this Python lacks {lacks}; benchmarks/GPU.md says how to install them\n"
    assert not (tmp_path / "out").exists()


def test_the_packages_are_those_of_the_page():
    (listed,) = re.findall(r"`pip install --no-deps (.*?)`", (ROOT / "benchmarks/GPU.md").read_text())
    known = {"torch", "transformers", "pytest", "numpy", "safetensors", "triton"}
    assert {name.split("==")[0].replace("-", "_") for name in listed.split()} == set(PACKAGES) - known


def test_what_starts_processes_runs_on_a_bare_host(call, bare, tmp_path):
    """The script's own command, where megadyn is not installed and nothing is that a host with torch may lack: of what
    DeepSpeed and others require, only what the script asks for. pytest has no plug-ins."""
    link_packages(HOST, Path(bare["BARE"]), with_required=True)
    link_packages(PACKAGES, Path(bare["BARE"]), with_required=False)
    names = ("tests", *(name for name in STARTS_PROCESSES if name != "engine-7b"))
    done = call(*names, **bare)
    assert done.returncode == 0, "".join(
        path.read_text()[-2000:] for path in (tmp_path / "out").glob("*.txt")
    )
    assert call.made() == sorted(f"{name}.md" for name in names)
    (table,) = (tmp_path / "out").glob("*engine.md")
    assert "| mod:0.125 | " in table.read_text()
    assert "\nattention: sdpa (" in table.read_text()
