"""Progress of a long job: a bar on a terminal, otherwise a log line now and then."""

import ctypes
import multiprocessing
import sys
import time
from types import TracebackType
from typing import Self

from megadyn.log import log

LINE_SECONDS = 10.0


class Progress:
    """Counts of a job in several processes. All of them call `add`; the one that created it calls `show` regularly."""

    def __init__(self, total_bytes: int) -> None:
        self._total = max(1, total_bytes)
        self._counts = multiprocessing.get_context("fork").Array(ctypes.c_int64, 2)
        self._began = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no monitor thread: forked processes would lack it, but wait for it
            self._bar = tqdm(
                total=self._total, unit="B", unit_scale=True, mininterval=0.2, dynamic_ncols=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self.show()
            self._bar.close()

    def add(self, bytes_on_disk: int, tokens: int) -> None:
        with self._counts.get_lock():
            self._counts[0] += bytes_on_disk
            self._counts[1] += tokens

    def show(self) -> None:
        # Read without the lock, which a killed process may hold forever.
        done, tokens = list(self._counts.get_obj())
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{tokens / seconds / 1e6:.1f}M tokens/s", refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._last_line >= LINE_SECONDS and done:
            self._last_line = now
            log.info(
                "%3d %%, %.1f MB/s, %.1fM tokens/s, %d s left",
                100 * done // self._total,
                done / seconds / 1e6,
                tokens / seconds / 1e6,
                seconds * max(0, self._total - done) / done,
            )
