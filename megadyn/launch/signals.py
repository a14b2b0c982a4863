"""Signals that make a run save and end."""

import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

INTERVAL = 1.0
"""Seconds between two questions whether to stop. While the ranks ask, their devices are idle."""
MOST_STEPS = 20
"""Between two questions, however short the steps: one of them may suddenly take long."""


class Answer(NamedTuple):
    stop: bool
    """Whether any rank was asked to stop."""
    is_idle: bool
    """Whether no rank has work in the background."""
    is_over: bool = False
    """Whether any rank said that the run is over."""


class Signals:
    """SIGTERM, SIGINT or SIGUSR1 asks the run to save and end, on every rank after the same step: the one in progress, or, where
    steps take less than INTERVAL, one within about that time."""

    def __init__(self, on_stop: Callable[[str], None] = lambda name: None):
        """`on_stop` is called with the signal's name as soon as it arrives."""
        self.received: str | None = None
        """Why the run must stop: the signal's name, or another reason."""
        self._on_stop = on_stop
        # A host-side group: asking must not wait for the device.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._asked_at: float | None = None
        self._steps = 1
        """From the last question to the next."""
        self._left = 1
        """Of these, until the next question."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        self._on_stop(self.received)

    def request(self, why: str) -> None:
        """Asks the run to stop, from another thread of this process."""
        self.received = self.received or why

    def ask(self, is_busy: bool = False, is_over: bool = False, *, at_once: bool = False) -> Answer:
        """What holds for all ranks together, at the end of a step; `is_busy`: this one has work in the background;
        `is_over`: by this one's clock the run's time is up.

        Collective in the steps in which it asks, which are the same on all ranks, and where it is told to ask `at_once`. In the
        others the answer is no throughout.
        """
        self._left -= 1
        if self._left > 0 and not at_once:
            return Answer(stop=False, is_idle=False)
        now = time.monotonic()
        per_step = INTERVAL if self._asked_at is None else (now - self._asked_at) / self._steps
        steps = min(max(1, int(INTERVAL / max(per_step, 1e-6))), MOST_STEPS)
        flags = torch.tensor(
            [float(self.received is not None), float(is_busy), float(is_over), float(-steps)]
        )
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        stop, busy, over, steps_back = flags.tolist()
        self._asked_at, self._steps = now, int(-steps_back)  # the fewest that any rank proposed
        self._left = self._steps
        return Answer(bool(stop), not busy, bool(over))

    def reason(self) -> str:
        """Why the run must stop, from the first rank that was asked. Collective; call it after an answer that says stop."""
        reasons = [self.received]
        if self._group is not None:
            reasons = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, self.received, group=self._group)
        return next(reason for reason in reasons if reason)
