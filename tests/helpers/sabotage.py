"""What can be made to go wrong in a crew's ranks. Each is called with the rank, in its process, before the job begins."""

import errno
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megadyn import network, pretrain
from megadyn.checkpoint import writing
from megadyn.launch.processes import process_of
from megadyn.training.loader import Loader


def spoiled_losses(_rank: int, *, factors: dict[int, float], micro_batches: int = 4) -> None:
    """Multiplies the losses of the n-th training step that this process runs by `factors[n]`, counted from 1."""
    real, seen = network.linear_cross_entropy, 0

    def loss(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal seen
        if torch.is_grad_enabled():
            seen += 1
        return real(*arguments, **named) * factors.get((seen + micro_batches - 1) // micro_batches, 1.0)

    network.linear_cross_entropy = loss


def never_joined(rank: int, *, launcher: int) -> None:
    """Rank 1 never meets rank 0, whose launcher is the process `launcher`."""
    pretrain.launchers = lambda: [process_of(launcher)]
    if rank == 1:
        time.sleep(3600)


def slow_steps(rank: int, *, seconds: list[float], micro_batches: int = 2) -> None:
    """Each rank computes for so many seconds longer in a step, outside of all collectives."""
    real = network.linear_cross_entropy

    def loss(*arguments: Any, **named: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            time.sleep(seconds[rank] / micro_batches)
        return real(*arguments, **named)

    network.linear_cross_entropy = loss


def asserted_deterministic(_rank: int) -> None:
    """Fails in a step that may take algorithms whose bits differ each time."""
    real = network.linear_cross_entropy

    def loss(*arguments: Any, **named: Any) -> torch.Tensor:
        assert torch.are_deterministic_algorithms_enabled()
        return real(*arguments, **named)

    network.linear_cross_entropy = loss


def in_step(rank: int, *, victim: int, step: int, what: str) -> None:
    """The victim raises an error (`fail`), hangs (`hang`) or crashes (`crash`) when it reads the samples of a step."""
    real_watched, real_next = pretrain.Job.watched, Loader.__next__
    is_now = False

    def watched(job: pretrain.Job, loader: Loader) -> Any:
        nonlocal is_now
        is_now = rank == victim and job.state.iteration == step - 1
        return real_watched(job, loader)

    def read(loader: Loader) -> Any:
        if is_now:
            if what == "fail":
                raise RuntimeError("the disk is on fire")
            if what == "crash":
                os.abort()
            time.sleep(3600)
        return real_next(loader)

    pretrain.Job.watched, Loader.__next__ = watched, read


def full_disk(rank: int, *, victim: int, saves: list[int]) -> None:
    """There is no room on the victim's disk in its n-th saves, counted from 1, once a part is written."""
    real, seen = writing.save_file, 0

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal seen
        seen += path.name.startswith("weights")
        if rank == victim and seen in saves:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(tensors, path)

    writing.save_file = save_file


def slow_disk(_rank: int, *, seconds: float) -> None:
    """Every file takes `seconds` longer to write."""
    real = writing.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        time.sleep(seconds)
        real(tensors, path)

    writing.save_file = save_file


def small_files(_rank: int, *, limit: int) -> None:
    """No file can grow beyond `limit` bytes: as on a full disk, by the system's own hand."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@contextmanager
def no_room_beyond(limit: int) -> Iterator[None]:
    """The same in this process, for a while."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
