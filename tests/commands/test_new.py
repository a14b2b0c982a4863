"""`megadyn new`: a copy of an example that stands alone, and starts from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadyn.commands import main
from megadyn.commands.new import examples
from megadyn.config import load_config, resolved_config
from tests.helpers.published import write_models
from tests.helpers.tiny import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_names_each_example_and_says_what_it_is(capsys):
    assert main(["new"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(examples())
    assert {"quickstart", "dtf_50m", "mod_3b", "kinds"} <= set(examples())
    assert all(len(line.split()) > 3 and "#" not in line for line in lines)


@pytest.mark.parametrize("name", examples())
def test_each_copy_holds_the_configurations_of_the_example(name, folder):
    assert main(["new", name]) == 0
    copies = sorted(path.name for path in (folder / name).glob("*.yaml"))
    assert copies == sorted(path.name for path in (ROOT / "examples" / name).glob("*.yaml"))
    write_models(folder)
    for copy in copies:
        words = [] if name == "upcycle" else ["model.vocab_size=32000"]  # the base model has its own
        ours, theirs = (load_config(place / name / copy, words) for place in (folder, ROOT / "examples"))
        assert resolved_config(ours) == resolved_config(theirs)
    for path in (folder / name).rglob("*"):
        assert not path.is_symlink() and (path.suffix != ".sh" or os.access(path, os.X_OK))
        assert path.is_dir() or "../" not in path.read_text()


def test_the_copied_run_script_checks_the_run_and_starts_the_launcher(folder):
    """From another folder, without the source tree: `torchrun` is a stand-in that takes down its words."""
    assert main(["new", "mod", "--output", "deep/mine"]) == 0
    commands = folder / "bin"
    commands.mkdir()
    for name, text in (
        ("torchrun", f'echo "$@" >{folder}/started'),
        ("python", f'exec {sys.executable} "$@"'),
    ):
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LAUNCHER": "torchrun",
        "GPUS": "2",
    }

    def call(*words):
        return subprocess.run(
            [folder / "deep/mine/run.sh", *words], cwd=folder, env=environment, capture_output=True, text=True
        )

    done = call("training.global_batch_size=64")
    assert done.returncode == 0, done.stderr
    words = Path(folder / "started").read_text().split()
    assert words[-4:] == [
        "-m",
        "megadyn.pretrain",
        str(folder / "deep/mine/config.yaml"),
        "training.global_batch_size=64",
    ]
    (folder / "started").unlink()
    done = call("parallel.pipeline=4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "number of processes = 2" in done.stderr
    assert not (folder / "started").exists()


def test_what_is_there_is_kept_and_slips_are_refused(folder, capsys):
    (folder / "mod").mkdir()
    (folder / "mod/mine").write_text("")
    for words, said in (
        (["mod"], "mod exists already; name another folder with --output"),
        (["dtf_5m"], "dtf_5m: no such example (did you mean 'dtf_50m'?); `megadyn new` lists them"),
        (["../mod"], "../mod: no such example"),
    ):
        assert main(["new", *words]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mod"]
