"""Splits the time of a step into parts, for steps that are reported. Other steps do not use it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any

import torch

from megadyn.engine.replaced import replaced

PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")
"""`data`: waiting for samples and moving them to the device. `communication`: every blocking collective, send and
receive, whatever calls it (tensor parallelism in forward and backward, pipeline stages, gradient reduction, weight
gathering), except those of compiled layers, which are part of their graphs. It includes waiting for other ranks, and so
the pipeline bubble. An asynchronous collective (ZeRO's `overlap_comm`, its prefetching of weights) counts where its
handle is waited for; a wait for a stream is not seen. What a thread in the background sends, for a checkpoint, is no part
of a step. `forward`, `backward` and `optimizer` are what remains of these; recomputation
counts as `backward`. `other`: everything else."""

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather_base",
    "all_gather_coalesced",
    "all_to_all_single",
    "send",
    "recv",
    "barrier",
)
"""Collectives by their names in torch.distributed, which the model calls, and in DeepSpeed's backend."""


class StepClock:
    """Time of a step by part. One part runs at a time: an inner part interrupts the outer one, so the parts add up to the step.

    On a CUDA device, marks are events on the stream, which are not waited for until `read`. Otherwise they are host times.
    """

    def __init__(self, device: torch.device):
        self._on_stream = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # (the part that ran until then, time)
        self._running: list[str] = []
        self._watched: list[tuple[Any, Sequence[str]]] = []
        self._stream: Any = None
        self._thread: threading.Thread | None = None

    def watch(self, owner: Any, names: Sequence[str]) -> None:
        """Counts calls of these functions of `owner` (a module or an object) as communication in measured steps."""
        self._watched.append((owner, [name for name in names if hasattr(owner, name)]))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures what runs inside as one step."""
        with ExitStack() as restored:
            for owner, names in self._watched:
                for name in names:
                    restored.enter_context(
                        replaced(owner, name, self.timed("communication", getattr(owner, name)))
                    )
            # DeepSpeed reduces on its own stream, where a mark would be out of order.
            self._stream = torch.cuda.current_stream() if self._on_stream else None
            self._thread = threading.current_thread()
            self._running = ["other"]
            self._marks = [("", self._now())]
            try:
                yield
            finally:
                self._mark("other")
                self._running = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside as `name`, except inner parts. Has an effect only in a measured step."""
        self._mark(self._running[-1])
        self._running.append(name)
        try:
            yield
        finally:
            self._mark(self._running.pop())

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            if self._is_background():
                return function(*args, **kwargs)
            with self.part(name):
                return function(*args, **kwargs)

        return inside

    def _is_background(self) -> bool:
        """Whether the current thread takes no part in the step: neither the one that is measured, nor one of autograd's, which
        Python did not start."""
        thread = threading.current_thread()
        return thread is not self._thread and not isinstance(thread, threading._DummyThread)

    def read(self) -> dict[str, float]:
        """Milliseconds of the last step by PARTS; their sum is the step's time. Empty if none was measured. Waits for
        the device."""
        marks, self._marks = self._marks, []
        if not marks:
            return {}
        if self._on_stream:
            marks[-1][1].synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, before), (name, after) in pairwise(marks):
            spent[name] += before.elapsed_time(after) if self._on_stream else (after - before) * 1e3
        return spent

    def _mark(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def _now(self) -> Any:
        if not self._on_stream:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event
