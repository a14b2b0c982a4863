"""Collectives as forward/backward pairs. None modifies its caller's tensor.

    name              forward                  backward                where
    copy_to_tp        identity                 sum over tp             before linears cut along their outputs
    reduce_from_tp    sum over tp              identity                after a linear cut along its inputs
    gather_from_tp    join the last dimension  this rank's part        whole logits, outside training
    enter_tp          copy_to_tp, or under sequence parallelism: join the sequence; backward sum, this rank's part
    leave_tp          reduce_from_tp, or under sequence parallelism: sum, this rank's part; backward join the sequence
    whole_sequence    join the sequence        none                    scores, for choices over the whole sequence
    own_part          this rank's part         zeros elsewhere         tensors that every rank holds whole
    whole_batch       join samples over dp     none                    recorded choices

Under sequence parallelism (arXiv 2205.05198) each tensor rank holds a part [B, T/tp, ...] of the sequence wherever
nothing is cut over heads or widths. Then `seq` is the tensor axis; otherwise it is an axis of size 1, with which all of
this does nothing. A weight used on a part of the sequence gets a part of its gradient, so it must pass through
`copy_to_tp(weight, seq)`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.parallel.grid import Axis

# torch 2.13 renamed these two, and warns at every call by the old name. They take one tensor for all parts; a list of parts
# would be copied once more by each.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
_AS_IMPORTED = {name: getattr(dist, name) for name in ("all_reduce", GATHER, SCATTER)}


def _collective(name: str) -> Callable[..., Any]:
    """A function of torch.distributed. A measured step replaces it by one that takes the time, which must not get into a
    compiled graph: it would be compiled anew for such steps."""
    return _AS_IMPORTED[name] if torch.compiler.is_compiling() else getattr(dist, name)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sum of `x` over the ranks of `axis`, bitwise equal on all of them."""
    if axis.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
    _collective("all_reduce")(x, group=axis.group)
    return x


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum of `x` over the ranks of `axis`; without gradient."""
    if axis.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    _collective("all_reduce")(x, op=dist.ReduceOp.MAX, group=axis.group)
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


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seq: Axis) -> Tensor:
        ctx.seq = seq
        return whole_sequence(x, seq)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_of_part(grad, ctx.seq), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seq: Axis) -> Tensor:
        ctx.seq = seq
        return _sum_of_part(x, seq)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return whole_sequence(grad, ctx.seq), None


def whole_sequence(x: Tensor, seq: Axis) -> Tensor:
    """[B, T/seq, ...] -> [B, T, ...], without gradient."""
    if seq.size == 1:
        return x
    batch, part, *rest = x.shape
    parts = x.new_empty(seq.size * batch, part, *rest)
    _collective(GATHER)(parts, x.contiguous(), group=seq.group)
    # No copy for one sample.
    return parts.view(seq.size, batch, part, *rest).transpose(0, 1).reshape(batch, seq.size * part, *rest)


def whole_batch(x: Tensor, dp: Axis) -> Tensor:
    """[B/dp, ...] -> [B, ...], without gradient."""
    if dp.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dp.size)]
    dist.all_gather(parts, x.contiguous(), group=dp.group)
    return torch.cat(parts)


def own_part(x: Tensor, seq: Axis) -> Tensor:
    """[B, T, ...] -> this rank's [B, T/seq, ...]."""
    return x if seq.size == 1 else x.chunk(seq.size, dim=1)[seq.rank]


def _sum_of_part(x: Tensor, seq: Axis) -> Tensor:
    """The sum over ranks of [B, T, ...], reduced to this rank's part [B, T/seq, ...]."""
    batch, length, *rest = x.shape
    part = length // seq.size
    parts = x.unflatten(1, (seq.size, part)).transpose(0, 1).reshape(seq.size * batch, part, *rest)
    out = x.new_empty(batch, part, *rest)
    _collective(SCATTER)(out, parts.contiguous(), group=seq.group)
    return out


def enter_tp(x: Tensor, tp: Axis, seq: Axis) -> Tensor:
    """Before linears cut along their outputs: x [B, T/seq, D] -> [B, T, D]; backward sums the gradients of all ranks."""
    return copy_to_tp(x, tp) if seq.size == 1 else _GatherSequence.apply(x, seq)


def leave_tp(x: Tensor, tp: Axis, seq: Axis) -> Tensor:
    """After a linear cut along its inputs: terms x [B, T, D] -> their sum over ranks, [B, T/seq, D]."""
    return reduce_from_tp(x, tp) if seq.size == 1 else _ScatterSequence.apply(x, seq)


def copy_to_tp(x: Tensor, tp: Axis) -> Tensor:
    """x unchanged, of any shape; backward sums the gradients of all ranks, each of which has used it."""
    return x if tp.size == 1 else _CopyToTP.apply(x, tp)


def reduce_from_tp(x: Tensor, tp: Axis) -> Tensor:
    """The sum of all ranks' x, of any shape; its gradient is passed to each rank unchanged."""
    return x if tp.size == 1 else _ReduceFromTP.apply(x, tp)


def gather_from_tp(x: Tensor, tp: Axis) -> Tensor:
    """[..., n] -> [..., n * tp], the ranks' parts in order; each rank gets its own part of the gradient."""
    return x if tp.size == 1 else _GatherFromTP.apply(x, tp)
