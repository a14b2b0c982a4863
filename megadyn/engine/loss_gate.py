"""Detects a bad step and keeps it out of the weights."""

import math
from typing import Any

import torch
from torch import Tensor

from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import sum_over


class LossGate:
    """Keeps a bad step out of the weights under every engine.

    The step's mean loss is known after its last forward pass. If it is bad, the last backward pass produces NaN
    gradients. Then the gradient norm is NaN on every rank, and each of DeepSpeed's optimizers, and ours for ZeRO-0,
    skips the step as it does after a gradient overflow. The loss itself is not changed.
    """

    def __init__(self, micro_batches: int, dp: Axis):
        self.micro_batches, self.dp = micro_batches, dp
        self.limit = math.inf
        self._total: Tensor | None = None
        self._seen = 0

    def __call__(self, loss: Tensor) -> Tensor:
        """Passes on a micro-batch's loss before backward. Collective over data-parallel ranks in the step's last micro-batch."""
        if not torch.is_grad_enabled():  # evaluation
            return loss
        self._total = loss.detach().float() if self._total is None else self._total + loss.detach()
        self._seen += 1
        if self._seen < self.micro_batches:
            return loss
        mean = sum_over(self._total, self.dp) / (self.micro_batches * self.dp.size)
        self._total, self._seen = None, 0
        return _SpoilGradient.apply(loss, ~torch.isfinite(mean) | (mean > self.limit))


class _SpoilGradient(torch.autograd.Function):
    """Identity; if `bad` is true the gradient is NaN. Decided on the device, without waiting for it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bad,) = ctx.saved_tensors
        return torch.where(bad, math.nan, grad), None


def problem_of(
    loss: float, grad_norm: float, limit: float, *, was_applied: bool, can_scale_down: bool
) -> str | None:
    """Why a step is bad, or None.

    Args:
        can_scale_down: fp16's loss scale was above its minimum. Then overflowing gradients only mean that the scale
            must fall further. At the minimum, overflow cannot be resolved.
    """
    if not math.isfinite(loss):
        return f"a loss of {loss}"
    if was_applied or (can_scale_down and loss <= limit):
        return None
    return f"a loss of {loss:.4f}, above {limit:.4f}" if loss > limit else f"a gradient norm of {grad_norm}"
