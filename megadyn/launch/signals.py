"""Signals that make a run save and end."""

import signal
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist


class Answer(NamedTuple):
    stop: bool
    """Whether any rank was asked to stop."""
    is_idle: bool
    """Whether no rank has work in the background."""


class Signals:
    """On SIGTERM, SIGINT or SIGUSR1, all ranks save and end after the same step, the one in progress."""

    def __init__(self, on_stop: Callable[[str], None] = lambda name: None):
        """`on_stop` is called with the signal's name as soon as it arrives."""
        self.received: str | None = None
        """Why the run must stop: the signal's name, or another reason."""
        self._on_stop = on_stop
        # A CPU group: checking every step must not wait for the device.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
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

    def ask(self, is_busy: bool = False) -> Answer:
        """The answer for all ranks together; `is_busy`: whether this rank has work in the background. Collective."""
        flags = torch.tensor([float(self.received is not None), float(is_busy)])
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        stop, busy = flags.tolist()
        return Answer(bool(stop), not busy)

    def reason(self) -> str:
        """Why the run must stop, from the first rank that was asked. Collective; call it after an answer that says stop."""
        reasons = [self.received]
        if self._group is not None:
            reasons = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, self.received, group=self._group)
        return next(reason for reason in reasons if reason)
