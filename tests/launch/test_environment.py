"""The record of what a run ran on."""

import json
import subprocess
from pathlib import Path

import torch

from megadyn.launch.environment import commit_of, describe, record_start, variables, versions
from megadyn.parallel.grid import Axis, Grid


def test_each_start_adds_its_record_until_the_run_begins_anew(tmp_path, monkeypatch):
    places = [
        ("node0", "NVIDIA H200"),
        ("node0", "NVIDIA H200"),
        ("node1", "NVIDIA H200"),
        ("node1", "NVIDIA H100"),
    ]
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda into, mine: into.__setitem__(slice(None), places)
    )
    grid = Grid(tp=Axis("tp", 0, 2), dp=Axis("dp", 0, 2))
    for iteration in (0, 120):
        record_start(tmp_path, grid, 1, torch.device("cpu"), iteration, 9)
    first, second = map(json.loads, (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (first["iteration"], second["iteration"]) == (0, 120)
    assert second["hosts"] == {"node0": 2, "node1": 2}
    assert second["devices"] == {"NVIDIA H200": 3, "NVIDIA H100": 1}
    assert second["world"] == {"size": 4, "tensor": 2, "pipeline": 1, "data": 2, "zero": 1}
    assert second["versions"]["torch"] == torch.__version__
    record_start(tmp_path, grid, 1, torch.device("cpu"), 0, 9)
    assert len((tmp_path / "environment.jsonl").read_text().splitlines()) == 1


def test_versions_name_what_is_missing():
    found = versions()
    assert (
        found["python"].startswith("3.") and found["deepspeed"] and found["transformers"] and found["megadyn"]
    )
    assert "flash-attn" in found


def test_of_the_variables_only_those_that_matter_and_no_secret():
    given = {
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "4",
        "HOME": "/root",
        "WANDB_API_KEY": "x",
        "HF_TOKEN": "x",
        "MEGADYN_SECRET": "x",
        "TORCH_AUTH_TOKEN": "x",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_PROCID": "3",
        "OMPI_COMM_WORLD_RANK": "1",
    }
    assert variables(given) == {
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "7",
        "WORLD_SIZE": "4",
    }


def test_the_commit_is_that_of_a_package_that_git_tracks(tmp_path):
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert commit_of(package) is None
    git("init", "-q")
    git("add", "package")
    git("commit", "-qm", "m")
    assert commit_of(package) == git("rev-parse", "HEAD")
    assert commit_of(installed) is None  # in a repository that is not its own
    (package / "__init__.py").write_text("changed")
    assert commit_of(package) == git("rev-parse", "HEAD") + "-dirty"
    assert commit_of(Path("/nowhere")) is None


def test_a_description_can_be_written_and_compared():
    record = describe([("h", "CPU")], Grid(), 0, 3)
    assert json.loads(json.dumps(record)) == record
