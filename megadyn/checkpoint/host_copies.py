"""Copies of an engine's tensors in host memory, for a checkpoint that is written from there."""

from collections.abc import Callable

import torch
from torch import Tensor

from megadyn.log import log

CHUNK = 2**26
"""Least bytes of page-locked memory that are asked for at once."""
ALIGNED = 512
"""Copies begin at multiples of this many bytes."""


def page_locked(size: int) -> Tensor:
    """Bytes that a GPU writes to by itself; raises RuntimeError if the host has not so many."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def wait_for_gpu() -> None:
    """Until all copies that were started are complete."""
    torch.cuda.current_stream().synchronize()


class HostCopies:
    """Copies for one checkpoint after another, each in the memory of the one before, which must be written by then.

    From a GPU they go to page-locked memory, which it writes to by itself, so that none waits for the one before. Getting such
    memory takes longer than the copies, so it is kept. torch rounds it up to a power of two, so that tensors share what one
    request gives.
    """

    def __init__(
        self,
        device: str = "cuda",
        allocate: Callable[[int], Tensor] = page_locked,
        wait: Callable[[], None] = wait_for_gpu,
    ):
        """Tensors on another type of device than `device` are copied at once, into new memory."""
        self.device, self._allocate, self._wait = device, allocate, wait
        self._chunks: list[Tensor] = []
        self._used: list[int] = []  # bytes of each
        self._lacks_memory = self._is_copying = False

    def begin(self) -> None:
        """Gives the memory of the last checkpoint to the next one."""
        self._used = [0] * len(self._chunks)

    def copy(self, value: Tensor) -> Tensor:
        """A contiguous copy, complete after `finish`."""
        buffer = self._buffer(value) if value.device.type == self.device else None
        if buffer is None:
            return value.to("cpu", copy=True).contiguous()
        self._is_copying = True
        return buffer.copy_(value, non_blocking=True)

    def finish(self) -> None:
        """Waits for the copies, once for all."""
        if self._is_copying:
            self._wait()
            self._is_copying = False

    def _buffer(self, value: Tensor) -> Tensor | None:
        """Page-locked memory in the form of `value`: where there is room, or new. None if the host has no more."""
        size = -(-value.nbytes // ALIGNED) * ALIGNED
        if not size:
            return None
        fits = (i for i, chunk in enumerate(self._chunks) if self._used[i] + size <= len(chunk))
        index = next(fits, len(self._chunks))
        if index == len(self._chunks) and not self._has_more(size):
            return None
        first = self._used[index]
        self._used[index] += size
        return self._chunks[index][first : first + value.nbytes].view(value.dtype).view(value.shape)

    def _has_more(self, size: int) -> bool:
        """Asks for a chunk with this room."""
        if self._lacks_memory:
            return False
        try:
            chunk = self._allocate(max(CHUNK, 1 << (size - 1).bit_length()))
        except RuntimeError as error:
            self._lacks_memory = True
            log.warning(
                "copies for checkpoints go through ordinary host memory, which is slower: no page-locked memory (%s)",
                str(error).partition("\n")[0],
            )
            return False
        self._chunks.append(chunk)
        self._used.append(0)
        return True
