"""What can end or spoil a run: signals from outside, losses that are no number or far too high."""

import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.config import TrainingConfig
from megadyn.errors import RunError
from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import sum_over


class TrainingDiverged(RunError):
    """A step was bad and the run is not to go on. The step did not reach the weights; the last checkpoint is intact."""

    is_everywhere = True


class Answer(NamedTuple):
    stop: bool
    """Some rank was asked to stop."""
    is_idle: bool
    """No rank has work in the background."""


class Signals:
    """SIGTERM, SIGINT or SIGUSR1 asks the run to save and end after the step in progress, on every rank in the same step."""

    def __init__(self, on_stop: Callable[[str], None] = lambda name: None):
        """`on_stop` is told the signal's name as soon as it arrives."""
        self.received: str | None = None
        """What asked the run to stop: the signal's name, or words."""
        self._on_stop = on_stop
        # A host-side group: asking every step must not wait for the device.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)          # asked twice, it ends at once
        self._on_stop(self.received)

    def request(self, why: str) -> None:
        """Asks for the same from another thread of this process."""
        self.received = self.received or why

    def ask(self, is_busy: bool = False) -> Answer:
        """What holds for all ranks together; `is_busy`: this one has work in the background. Collective."""
        flags = torch.tensor([float(self.received is not None), float(is_busy)])
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        stop, busy = flags.tolist()
        return Answer(bool(stop), not busy)

    def reason(self) -> str:
        """What asked the run to stop, from the first rank that was asked. Collective, after an answer that says stop."""
        reasons = [self.received]
        if self._group is not None:
            reasons = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, self.received, group=self._group)
        return next(reason for reason in reasons if reason)


class LossRule:
    """Which losses are bad: NaN, infinite, or a spike over the median of the good steps before. Counts bad steps. Equal on all
    ranks; part of every checkpoint."""

    def __init__(self, config: TrainingConfig):
        self.factor, self.window = config.spike_factor, config.spike_window
        self.most_in_a_row, self.most = config.max_bad_steps, config.max_bad_steps_total
        self.recent: deque[float] = deque(maxlen=self.window)
        self.bad_steps = 0
        """Of the whole run."""
        self.in_a_row = 0
        """Without progress: since the last good step beyond all bad ones."""
        self.last_bad = 0
        """The highest iteration whose step was bad."""
        self.last_was_bad = False
        """The last step was bad: what is saved now does not count as a good checkpoint."""
        self.last_loss = 0.0

    @property
    def limit(self) -> float:
        """The highest good loss; infinite until `spike_window` good steps were seen, or without a spike rule."""
        if not self.factor or len(self.recent) < self.window:
            return math.inf
        return self.factor * statistics.median(self.recent)

    def note(self, iteration: int, loss: float) -> None:
        """Takes a good step into the rule."""
        self.recent.append(loss)
        self.last_was_bad, self.last_loss = False, loss
        if iteration > self.last_bad:                  # after a rollback the steps up to the bad one are no progress
            self.in_a_row = 0

    def note_bad(self, iteration: int, loss: float) -> None:
        self.bad_steps += 1
        self.in_a_row += 1
        self.last_bad = max(self.last_bad, iteration)
        self.last_was_bad, self.last_loss = True, loss

    def excess(self) -> str | None:
        """Which limit the bad steps so far exceed, as words that follow "this is bad step"; None while the run may go on."""
        if self.in_a_row > self.most_in_a_row:
            return f"{self.in_a_row} in a row, more than training.max_bad_steps = {self.most_in_a_row}"
        if self.bad_steps > self.most:
            return f"{self.bad_steps} of the run, more than training.max_bad_steps_total = {self.most}"
        return None

    def state(self) -> dict[str, Any]:
        return {"recent_losses": list(self.recent), "bad_steps": self.bad_steps, "bad_in_a_row": self.in_a_row,
                "last_bad": self.last_bad, "last_was_bad": self.last_was_bad}

    def set_state(self, state: dict[str, Any]) -> None:
        """The counts only rise: going back does not undo bad steps."""
        self.recent = deque(state["recent_losses"], maxlen=self.window)
        self.bad_steps = max(self.bad_steps, state["bad_steps"])
        self.in_a_row = max(self.in_a_row, state.get("bad_in_a_row", 0))
        self.last_bad = max(self.last_bad, state.get("last_bad", 0))
        self.last_was_bad = state.get("last_was_bad", False)


class LossGate:
    """Keeps a bad step out of the weights, whatever the engine.

    The step's mean loss is known after its last forward pass. If it is bad, the last backward pass is made to yield
    NaN: then the gradient norm is NaN on every rank, and each of DeepSpeed's optimizers, and ours of ZeRO-0, passes
    the step over by itself, as it does where gradients overflow. The loss itself stays as it is.
    """

    def __init__(self, micro_batches: int, dp: Axis):
        self.micro_batches, self.dp = micro_batches, dp
        self.limit = math.inf
        self._total: Tensor | None = None
        self._seen = 0

    def __call__(self, loss: Tensor) -> Tensor:
        """A micro-batch's loss, on its way to the backward pass. Collective over data-parallel ranks at the step's last."""
        if not torch.is_grad_enabled():                # an evaluation
            return loss
        self._total = loss.detach().float() if self._total is None else self._total + loss.detach()
        self._seen += 1
        if self._seen < self.micro_batches:
            return loss
        mean = sum_over(self._total, self.dp) / (self.micro_batches * self.dp.size)
        self._total, self._seen = None, 0
        return _SpoilGradient.apply(loss, ~torch.isfinite(mean) | (mean > self.limit))


class _SpoilGradient(torch.autograd.Function):
    """Identity; where `bad` is true the gradient is NaN. Decided on the device: nothing waits for it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        bad, = ctx.saved_tensors
        return torch.where(bad, math.nan, grad), None


def problem_of(loss: float, grad_norm: float, limit: float, *, was_applied: bool, can_scale_down: bool) -> str | None:
    """Why a step is bad, or None.

    Args:
        can_scale_down: fp16's loss scale was above its lowest value. Gradients that overflow are then part of finding the
            scale; at the lowest value nothing would ever make them fit.
    """
    if not math.isfinite(loss):
        return f"a loss of {loss}"
    if was_applied or (can_scale_down and loss <= limit):
        return None
    return f"a loss of {loss:.4f}, above {limit:.4f}" if loss > limit else f"a gradient norm of {grad_norm}"


def problem_at_end(evaluations: dict[str, dict[str, float]], last_loss: float) -> str | None:
    """Why the model of a complete run is worthless: NaN or infinite losses. None if it is not.

    Args:
        evaluations: by set and routing mode. last_loss: of the last step, which counts where nothing was evaluated.
    """
    for name, losses in evaluations.items():
        for mode, loss in losses.items():
            if not math.isfinite(loss):
                return f"the {name} loss ({mode}) is {loss} at the end of the run"
    if not evaluations and not math.isfinite(last_loss):
        return f"the loss of the last step is {last_loss}"
    return None
