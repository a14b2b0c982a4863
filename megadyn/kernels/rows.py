"""Takes out chosen rows of a matrix, puts them back with a gate or in place of others, and multiplies rows by numbers. Import
only if Triton can run.

N tokens of width D, C of them chosen, each once. A program handles one row, in blocks of at most `BLOCK` columns.
Products and sums are in float32; results are rounded once, when they are stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadyn.kernels.launch import has_values

BLOCK = 1024


def block_of(width: int) -> int:
    """Columns that a program reads at once; a power of two, as Triton requires."""
    return min(BLOCK, triton.next_power_of_2(width))


@triton.jit
def _copy_rows(source, target, place, width, scatter: tl.constexpr, BLOCK: tl.constexpr):
    """target[c] = source[place[c]], or with `scatter` target[place[c]] = source[c]."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits, because N * D may exceed 2^31
    chosen = tl.load(place + row)
    at = source + (row if scatter else chosen) * width
    to = target + (chosen if scatter else row) * width
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(to + column, tl.load(at + column, mask=column < width), mask=column < width)


@triton.jit
def _add_rows(x, update, gate, slot, out, width, BLOCK: tl.constexpr):
    """out[n] = x[n] + gate[n] * update[slot[n]], or x[n] where slot[n] < 0."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(slot + row).to(tl.int64)
    weight = tl.load(gate + row).to(tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(x + row * width + column, mask=inside)
        if source >= 0:
            change = tl.load(update + source * width + column, mask=inside).to(tl.float32)
            value = (value.to(tl.float32) + weight * change).to(value.dtype)
        tl.store(out + row * width + column, value, mask=inside)


@triton.jit
def _add_rows_backward(grad_out, update, gate, place, grad_update, grad_gate, width, BLOCK: tl.constexpr):
    """grad_update[c] = gate[p] * grad_out[p] and grad_gate[p] = <grad_out[p], update[c]>, p = place[c]."""
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(place + row)
    weight = tl.load(gate + chosen).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        grad = tl.load(grad_out + chosen * width + column, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(update + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            grad_update + row * width + column, (weight * grad).to(grad_update.dtype.element_ty), mask=inside
        )
        total += grad * change
    tl.store(grad_gate + chosen, tl.sum(total, axis=0).to(grad_gate.dtype.element_ty))


@triton.jit
def _scale_rows(x, gate, out, width, BLOCK: tl.constexpr):
    """out[n] = gate[n] * x[n]."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(gate + row).to(tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(x + row * width + column, mask=inside).to(tl.float32)
        tl.store(out + row * width + column, (weight * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scale_rows_backward(grad_out, x, gate, grad_x, grad_gate, width, BLOCK: tl.constexpr):
    """grad_x[n] = gate[n] * grad_out[n] and grad_gate[n] = <grad_out[n], x[n]>."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(gate + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        at = row * width + column
        grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, (weight * grad).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_gate + row, tl.sum(total, axis=0).to(grad_gate.dtype.element_ty))


@triton.jit
def _repeat_or_replace(x, update, slot, out, width, head, repeats, BLOCK: tl.constexpr):
    """out[n] = update[slot[n]], or where slot[n] < 0 each `head` columns of x[n] `repeats` times; out has `width` columns."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(slot + row).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        if source >= 0:
            value = tl.load(update + source * width + column, mask=inside)
        else:
            at = column // (head * repeats) * head + column % head
            value = tl.load(x + row * (width // repeats) + at, mask=inside)
        tl.store(out + row * width + column, value, mask=inside)


@triton.jit
def _repeat_or_replace_backward(grad_out, slot, grad_x, width, head, repeats, BLOCK: tl.constexpr):
    """grad_x[n] = the sum of the gradients of its copies, or 0 where slot[n] >= 0; grad_x has `width` columns."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(slot + row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        if source < 0:
            first = row * width * repeats + column // head * head * repeats + column % head
            for copy in range(repeats):
                total += tl.load(grad_out + first + copy * head, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * width + column, total.to(grad_x.dtype.element_ty), mask=inside)


def slots(place: Tensor, rows: int) -> Tensor:
    """The inverse of `place`, as int32 [rows]: slot[place[c]] = c, and -1 elsewhere."""
    slot = torch.full((rows,), -1, dtype=torch.int32, device=place.device)
    slot[place] = torch.arange(len(place), dtype=torch.int32, device=place.device)
    return slot


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(place)
        ctx.rows = x.shape[0]
        out = x.new_empty(len(place), x.shape[1])
        if out.numel() and has_values(x, moved=2 * out.nbytes + place.nbytes):
            _copy_rows[(len(place),)](x, out, place, x.shape[1], scatter=False, BLOCK=block_of(x.shape[1]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.rows, grad.shape[1])
        if grad.numel() and has_values(grad, moved=2 * grad.nbytes + place.nbytes):
            _copy_rows[(len(place),)](
                grad.contiguous(), out, place, grad.shape[1], scatter=True, BLOCK=block_of(grad.shape[1])
            )
        return out, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, gate: Tensor, update: Tensor) -> Tensor:
        x, gate, update = x.contiguous(), gate.contiguous(), update.contiguous()
        slot, out = slots(place, len(x)), torch.empty_like(x)
        if x.numel() and has_values(x, moved=2 * x.nbytes + update.nbytes + gate.nbytes + slot.nbytes):
            _add_rows[(len(x),)](x, update, gate, slot, out, x.shape[1], BLOCK=block_of(x.shape[1]))
        ctx.save_for_backward(place, gate, update)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        place, gate, update = ctx.saved_tensors
        grad_update, grad_gate = torch.empty_like(update), torch.zeros_like(gate)
        moved = 3 * update.nbytes + 2 * len(place) * gate.element_size() + place.nbytes
        if update.numel() and has_values(update, moved=moved):
            _add_rows_backward[(len(place),)](
                grad.contiguous(),
                update,
                gate,
                place,
                grad_update,
                grad_gate,
                update.shape[1],
                BLOCK=block_of(update.shape[1]),
            )
        return grad, None, grad_gate, grad_update  # the gradient of x is that of the output


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        x, gate = x.contiguous(), gate.contiguous()
        ctx.save_for_backward(x, gate)
        out = torch.empty_like(x)
        if x.numel() and has_values(x, moved=2 * x.nbytes + gate.nbytes):
            _scale_rows[(len(x),)](x, gate, out, x.shape[1], BLOCK=block_of(x.shape[1]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        grad_x, grad_gate = torch.empty_like(x), torch.zeros_like(gate)
        if x.numel() and has_values(x, moved=3 * x.nbytes + 2 * gate.nbytes):
            _scale_rows_backward[(len(x),)](
                grad.contiguous(), x, gate, grad_x, grad_gate, x.shape[1], BLOCK=block_of(x.shape[1])
            )
        return grad_x, grad_gate


class _RepeatOrReplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, update: Tensor, head: int) -> Tensor:
        x, update = x.contiguous(), update.contiguous()
        (rows, inner), width = x.shape, update.shape[1]
        slot, out = slots(place, rows), x.new_empty(rows, width)
        ctx.save_for_backward(place, slot)
        ctx.sizes = inner, head
        read = (rows - len(place)) * inner * x.element_size() + update.nbytes
        if out.numel() and has_values(x, moved=read + out.nbytes + slot.nbytes):
            _repeat_or_replace[(rows,)](
                x, update, slot, out, width, head, width // inner, BLOCK=block_of(width)
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (place, slot), (inner, head) = ctx.saved_tensors, ctx.sizes
        grad = grad.contiguous()
        (rows, width), grad_x = grad.shape, grad.new_empty(len(grad), inner)
        read = (rows - len(place)) * width * grad.element_size()
        if grad.numel() and has_values(grad, moved=read + grad_x.nbytes + slot.nbytes):
            _repeat_or_replace_backward[(rows,)](
                grad, slot, grad_x, inner, head, width // inner, BLOCK=block_of(inner)
            )
        return grad_x, None, take_rows(grad, place), None


def take_rows(x: Tensor, place: Tensor) -> Tensor:
    """x [N, D] at distinct rows place [C], int64 -> [C, D]."""
    out: Tensor = _TakeRows.apply(x, place)
    return out


def add_rows(x: Tensor, place: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """A copy of x [N, D] with update [C, D] times gate [N] added at distinct rows place [C]."""
    out: Tensor = _AddRows.apply(x, place, gate, update)
    return out


def scale_rows(x: Tensor, gate: Tensor) -> Tensor:
    """x [N, D] times gate [N], in x's dtype."""
    out: Tensor = _ScaleRows.apply(x, gate)
    return out


def repeat_or_replace(x: Tensor, place: Tensor, update: Tensor, head: int) -> Tensor:
    """The heads of x [N, G * head], each repeated D / (G * head) times -> [N, D]; rows at distinct places [C] are those of
    update [C, D] instead."""
    out: Tensor = _RepeatOrReplace.apply(x, place, update, head)
    return out
