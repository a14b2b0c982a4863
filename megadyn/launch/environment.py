"""What a run ran on: versions, devices, hosts, layout, variables. Each start adds one line to environment.jsonl."""

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megadyn
from megadyn.parallel.grid import Grid

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "flash-attn")
VARIABLES = re.compile(r"(CUDA|NCCL|TORCH|PYTORCH|OMP|MKL|GLOO|DS|MEGADYN|SLURM|OMPI|UCX|HSA|ROCR|FI)_")
"""Prefixes of environment variables to record."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
OTHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LD_PRELOAD")
NOT_OF_THE_RUN = re.compile(
    r"SLURM_.*(NODELIST|TASKS|PROCID|LOCALID|NODEID)|OMPI_.*(RANK|KEYS|FILE|ARGV|SESSION)"
)
"""Variables to leave out: specific to one rank, or as long as the list of hosts."""


def record_start(
    folder: Path, grid: Grid, zero_stage: int, device: torch.device, iteration: int, iterations: int
) -> list[str]:
    """Adds this start's record to the run folder; returns the host of each rank. Collective: rank 0 gathers all hosts and
    devices, and writes."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s) per rank"
    )
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (socket.gethostname(), name))
    if dist.get_rank() == 0:
        record = describe(places, grid, zero_stage, iteration) | {"iterations": iterations}
        # A new run starts a new file, as for metrics.jsonl.
        with (folder / "environment.jsonl").open("a" if iteration else "w") as file:
            print(json.dumps(record), file=file)
    return [host for host, _ in places]


def describe(places: list[tuple[str, str]], grid: Grid, zero_stage: int, iteration: int) -> dict[str, Any]:
    """`places`: host and device of each rank."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "iteration": iteration,
        "versions": versions(),
        "command": sys.argv,
        "platform": platform.platform(),
        "world": {
            "size": len(places),
            "tensor": grid.tp.size,
            "pipeline": grid.pp.size,
            "data": grid.dp.size,
            "zero": zero_stage,
        },
        "hosts": counted([host for host, _ in places]),
        "devices": counted([device for _, device in places]),
        "variables": variables(dict(os.environ)),
    }


def versions() -> dict[str, str | None]:
    """Versions by name; None for packages that are not installed or have no known version."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "megadyn": megadyn.__version__,
        "megadyn commit": commit_of(Path(megadyn.__file__).parent),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda, "nccl": nccl_version()}


def nccl_version() -> str | None:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None


def commit_of(package: Path) -> str | None:
    """The git commit of a package, with `-dirty` if tracked files were changed; None outside of a git working tree."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may be inside an ignored folder of an unrelated repository.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def counted(names: list[str]) -> dict[str, int]:
    """Number of ranks per name, in the order of ranks."""
    return {name: names.count(name) for name in dict.fromkeys(names)}


def variables(environment: dict[str, str]) -> dict[str, str]:
    """Variables that affect a run; nothing that may be a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (VARIABLES.match(name) or name in OTHERS)
        and not SECRET.search(name)
        and not NOT_OF_THE_RUN.fullmatch(name)
    }
