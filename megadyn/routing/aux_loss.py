"""Auxiliary losses without a path through the pipeline: their gradient is added where they arise."""

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """What the engine multiplies a micro-batch's loss by before backward: 1 / micro-batches (and fp16's scale)."""

    def __init__(self, value: float = 1.0):
        self.value = value


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


def attach_loss(activation: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`activation` unchanged; its backward pass also sends `scale` into the scalar `loss`."""
    return _AttachLoss.apply(activation, loss, scale)
