"""Micro-batches, read ahead by a thread."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megadyn.data.batches import read_batch
from megadyn.data.samples import Samples

AHEAD = 8
"""Largest number of micro-batches read ahead."""


class Loader:
    """Micro-batches of the samples `ids`, in order: (tokens, labels), [b, T] int64 each.

    A thread reads ahead. Its errors are raised when the micro-batch is requested. For a CUDA device the tensors are in
    pinned memory, so that copying them to the device does not block.
    """

    def __init__(self, samples: Samples, ids: Iterator[Sequence[int]], device: torch.device) -> None:
        self._samples, self._ids = samples, ids
        self._pinned = device.type == "cuda"
        self._waited_s = 0.0
        self._ready: deque[Future[tuple[Tensor, Tensor]]] = deque()
        # A new thread uses GPU 0 by default. If it pinned memory there, every rank of a node would use memory of that GPU.
        self._reader = ThreadPoolExecutor(
            1, "loader", partial(torch.cuda.set_device, device) if self._pinned else None
        )
        self._read_ahead()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread after the micro-batch that it is reading."""
        self._reader.shutdown(cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not self._ready:
            raise StopIteration
        asked = time.perf_counter()
        batch = self._ready.popleft().result()
        self._waited_s += time.perf_counter() - asked
        self._read_ahead()
        return batch

    def take_wait(self) -> float:
        """Seconds spent waiting for micro-batches since the last call."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def _read_ahead(self) -> None:
        while len(self._ready) < AHEAD and (ids := next(self._ids, None)) is not None:
            self._ready.append(self._reader.submit(self._read, ids))

    def _read(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens, labels = (torch.from_numpy(part).contiguous() for part in read_batch(self._samples, ids))
        return (tokens.pin_memory(), labels.pin_memory()) if self._pinned else (tokens, labels)
