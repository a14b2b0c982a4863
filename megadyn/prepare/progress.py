"""How far preprocessing is."""

import ctypes
import multiprocessing
import time
from types import TracebackType
from typing import Self

from megadyn.progress import BYTES, Bar


class Progress:
    """Counts of a job in several processes. All of them call `add`; the one that created it calls `show` regularly."""

    def __init__(self, total_bytes: int) -> None:
        self._counts = multiprocessing.get_context("fork").Array(ctypes.c_int64, 2)
        self._began = time.monotonic()
        self._bar = Bar("", total_bytes, BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.show()
        self._bar.close()

    def add(self, bytes_on_disk: int, tokens: int) -> None:
        with self._counts.get_lock():
            self._counts[0] += bytes_on_disk
            self._counts[1] += tokens

    def show(self) -> None:
        # Read without the lock, which a killed process may hold forever.
        done, tokens = list(self._counts.get_obj())
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._bar.reach(done, f"{tokens / seconds / 1e6:.1f}M tokens/s")
