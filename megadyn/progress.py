"""How far a long piece of work is: a bar with the time left on a terminal, a line of the log now and then elsewhere.

Bars go to standard error, as a tool's log does, so that standard output holds results alone. Work that takes less than a
second shows nothing.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from megadyn.log import log

LINE_SECONDS = 10.0
"""Between two lines, and before the first."""
BAR_AFTER_SECONDS = 1.0
BYTES = "B"

T = TypeVar("T")


taken = threading.Event()
"""Set while something else, the live view of a run, holds the terminal."""


def has_bars() -> bool:
    """On a terminal that nothing else holds, for rank 0 and its main thread."""
    return (
        sys.stderr is not None
        and sys.stderr.isatty()
        and not taken.is_set()
        and os.environ.get("RANK", "0") == "0"
        and threading.current_thread() is threading.main_thread()
    )


class Bar:
    """Counts to `total`. `reach` may be called as often as one likes; what is shown is renewed a few times a second at most."""

    def __init__(self, what: str, total: int, unit: str = "") -> None:
        """`what` is done, "" if that is clear; `unit`: `BYTES`, whose rate is shown, or "" for a number of things."""
        self.what, self.total, self.unit, self.done = what, max(1, total), unit, 0
        self._began = self._last_line = time.monotonic()
        self._bar: Any = None
        if has_bars():
            from tqdm import tqdm

            # No monitor thread: forked processes would lack it, and wait for it.
            tqdm.monitor_interval = 0
            self._bar = tqdm(
                total=self.total,
                desc=what or None,
                unit=unit or "it",
                unit_scale=unit == BYTES,
                mininterval=0.2,
                delay=BAR_AFTER_SECONDS,
                dynamic_ncols=True,
                leave=False,
                bar_format=None if unit == BYTES else "{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; lines go on, if there are more."""
        if self._bar is not None:
            self._bar.close()

    def add(self, more: int) -> None:
        self.reach(self.done + more)

    def reach(self, done: int, note: str = "") -> None:
        """`done` of the whole are behind us; `note` says more about them."""
        self.done = done
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < LINE_SECONDS or not done:
            return
        self._last_line = now
        log.info("%s", self.line(now - self._began, note))

    def line(self, seconds: float, note: str = "") -> str:
        parts = [f"{100 * self.done // self.total:3d} %"]
        if self.unit == BYTES:
            parts.append(f"{self.done / seconds / 1e6:.1f} MB/s")
        parts += [note] if note else []
        parts.append(f"{duration(seconds * max(0, self.total - self.done) / self.done)} left")
        return f"{self.what}: {', '.join(parts).lstrip()}" if self.what else ", ".join(parts)


def each(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The `items`, `total` in number, counted as they are done."""
    with Bar(what, total) as bar:
        for item in items:
            yield item
            bar.add(1)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Around work that does not tell how far it is: a line now and then says that it goes on."""
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(LINE_SECONDS):
            log.info("%s: %s so far", what, duration(time.monotonic() - began))

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def duration(seconds: float) -> str:
    """`3d04h`, `2h05m`, `4m07s`, `9s`: the two largest units."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if h:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"
