"""The loader reads ahead by a bounded number of micro-batches, in order, and hands on what goes wrong."""

import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from megadyn.errors import UserError
from megadyn.training import loader as module
from megadyn.training.loader import AHEAD, Loader

CPU = torch.device("cpu")


class Counting:
    """Samples whose tokens tell their number; `broken` cannot be read, and `gate` holds the reader up."""

    key, sequence_length = "counting", 5

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.taken, self.gate = broken, [], threading.Event()
        self.gate.set()

    def __len__(self) -> int:
        return 10**6

    def take(self, ids) -> np.ndarray:
        assert self.gate.wait(10)
        self.taken.append(list(ids))
        if self.broken in ids:
            raise UserError("sample 14 cannot be read")
        return 10 * np.array(ids)[:, None] + np.arange(6)


def pairs(end: int) -> Iterator[range]:
    """Micro-batches of two samples."""
    return (range(s, s + 2) for s in range(0, end, 2))


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_micro_batches_come_in_order_as_contiguous_tensors():
    with Loader(Counting(), pairs(60), CPU) as loader:
        batches = list(loader)
        assert len(readers()) == 1
    assert len(batches) == 30
    for s, (tokens, labels) in enumerate(batches):
        want = torch.tensor([[20 * s], [20 * s + 10]]) + torch.arange(6)
        assert torch.equal(tokens, want[:, :-1])
        assert torch.equal(labels, want[:, 1:])
        assert tokens.dtype == labels.dtype == torch.int64
        assert tokens.is_contiguous() and labels.is_contiguous()
    assert not readers()


def test_steps_are_slices_of_one_stream():
    with Loader(Counting(), pairs(12), CPU) as loader:
        steps = [[int(tokens[0, 0]) for tokens, _ in islice(loader, 3)] for _ in range(3)]
    assert steps == [[0, 20, 40], [60, 80, 100], []]


def test_it_reads_ahead_of_use_but_not_without_bound():
    samples = Counting()
    with Loader(samples, pairs(1000), CPU) as loader:
        loader._ready[-1].result()  # the last that it reads unasked
        assert len(samples.taken) == AHEAD
        next(loader)
        loader._ready[-1].result()
        assert len(samples.taken) == AHEAD + 1
    assert not readers()
    assert len(samples.taken) == AHEAD + 1


def test_an_error_is_raised_where_its_micro_batch_is_asked_for():
    with Loader(Counting(broken=14), pairs(1000), CPU) as loader:
        assert [int(tokens[0, 0]) for tokens, _ in islice(loader, 7)] == [20 * i for i in range(7)]
        with pytest.raises(UserError, match="sample 14 cannot be read"):
            next(loader)
    assert not readers()


def test_leaving_it_in_the_middle_ends_the_thread_and_reads_no_more():
    samples = Counting()
    samples.gate.clear()

    def fail() -> None:
        with Loader(samples, pairs(10**9), CPU):
            threading.Timer(0.1, samples.gate.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not readers()
    assert len(samples.taken) == 1  # the one that it was reading


def test_without_samples_it_starts_no_thread():
    with Loader(Counting(), pairs(0), CPU) as loader:
        assert list(loader) == []
        assert not readers()


def test_the_wait_is_counted_and_counted_once(monkeypatch):
    samples = Counting()
    samples.gate.clear()
    clock = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with Loader(samples, pairs(100), CPU) as loader:
        threading.Timer(0.05, samples.gate.set).start()
        next(loader)
        assert loader.take_wait() == 2.5
        next(loader)
        assert loader.take_wait() == 0.25
        assert loader.take_wait() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to pin memory for")
def test_for_a_cuda_device_the_tensors_are_pinned():
    device = torch.device("cuda", torch.cuda.current_device())
    with Loader(Counting(), pairs(4), device) as loader:
        tokens, labels = next(loader)
        assert tokens.is_pinned() and labels.is_pinned()
        assert torch.equal(tokens.to(device, non_blocking=True).cpu(), tokens)
