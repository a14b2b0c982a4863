"""Collectives as forward/backward pairs. None writes into its caller's tensor.

    name            forward                  backward                where
    copy_to_tp      identity                 sum over tp             before linears cut along their outputs
    reduce_from_tp  sum over tp              identity                after a linear cut along its inputs
    gather_from_tp  join the last dimension  this rank's part        whole logits, outside training
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.parallel.grid import Axis


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sum of `x` over the ranks of `axis`, bitwise equal on all of them."""
    if axis.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)       # all_reduce works in place
    dist.all_reduce(x, group=axis.group)
    return x


def max_over(x: Tensor, axis: Axis) -> Tensor:
    if axis.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad, ctx.tp), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        return sum_over(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(tp.size)]
        dist.all_gather(parts, x.contiguous(), group=tp.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.tp.size, dim=-1)[ctx.tp.rank].contiguous(), None


def copy_to_tp(x: Tensor, tp: Axis) -> Tensor:
    return x if tp.size == 1 else _CopyToTP.apply(x, tp)


def reduce_from_tp(x: Tensor, tp: Axis) -> Tensor:
    return x if tp.size == 1 else _ReduceFromTP.apply(x, tp)


def gather_from_tp(x: Tensor, tp: Axis) -> Tensor:
    return x if tp.size == 1 else _GatherFromTP.apply(x, tp)
