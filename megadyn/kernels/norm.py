"""A residual addition and the RMSNorm after it, in one pass each for forward and backward. Import only if Triton can run.

    h = x + u          y = h / rms(h) * w,  rms(h) = sqrt(mean(h^2) + eps)

Sums are in float32. A program handles one row of N. In backward it handles `GROUP` rows one after another, so that the
gradient of w [D] is a sum over a table with only N / GROUP rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadyn.kernels.launch import has_values

GROUP = 16


def warps_for(block: int) -> int:
    """Warps (of 32 threads) for a row of `block` columns, so that each thread has 8 to 32 columns."""
    return min(16, max(4, block // 512))


@triton.jit
def _forward(x, u, w, h, y, inverse, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(
        u + at, mask=inside, other=0.0
    ).to(tl.float32)
    total = total.to(h.dtype.element_ty)  # rounded as it is stored, because backward uses the stored value
    tl.store(h + at, total, mask=inside)
    total = total.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
    tl.store(inverse + row, scale)
    weight = tl.load(w + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (total * scale * weight).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_y,
    grad_h,
    h,
    w,
    inverse,
    grad_x,
    grad_w,
    rows,
    width,
    has_grad_h: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With n = h / rms: grad_x = (w grad_y - n mean(n w grad_y)) / rms + grad_h, and grad_w = sum of grad_y n over this group."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(w + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(GROUP):
        row = group * GROUP + turn
        here = inside & (row < rows)
        at = row * width + column
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)
        normed = tl.load(h + at, mask=here, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_y + at, mask=here, other=0.0).to(tl.float32)
        total += grad * normed
        grad *= weight
        grad = (grad - normed * (tl.sum(grad * normed, axis=0) / width)) * scale
        if has_grad_h:
            grad += tl.load(grad_h + at, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=here)
    tl.store(grad_w + group * width + column, total, mask=inside)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, u, w = x.contiguous(), u.contiguous(), w.contiguous()
        rows, width = x.shape
        h, y = torch.empty_like(x), torch.empty_like(x)
        inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows and has_values(x, moved=4 * x.nbytes + w.nbytes + inverse.nbytes):
            block = triton.next_power_of_2(width)
            _forward[(rows,)](x, u, w, h, y, inverse, width, eps, BLOCK=block, num_warps=warps_for(block))
        ctx.save_for_backward(h, w, inverse)
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        h, w, inverse = ctx.saved_tensors
        if grad_y is None:
            return grad_h, grad_h, None, None
        rows, width = h.shape
        groups = triton.cdiv(rows, GROUP)
        grad_x, grad_w = torch.empty_like(h), torch.empty(groups, width, dtype=torch.float32, device=h.device)
        passes = 3 if grad_h is None else 4
        if rows and has_values(h, moved=passes * h.nbytes + w.nbytes + inverse.nbytes + grad_w.nbytes):
            block = triton.next_power_of_2(width)
            _backward[(groups,)](
                grad_y.contiguous(),
                h if grad_h is None else grad_h.contiguous(),
                h,
                w,
                inverse,
                grad_x,
                grad_w,
                rows,
                width,
                has_grad_h=grad_h is not None,
                GROUP=GROUP,
                BLOCK=block,
                num_warps=warps_for(block),
            )
        return grad_x, grad_x, grad_w.sum(dim=0).to(w.dtype), None


def add_norm(x: Tensor, u: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, u [..., D] and w [D] -> x + u and its RMSNorm, each [..., D] in x's dtype; D at most `LARGEST_WIDTH`."""
    h, y = _AddNorm.apply(x.flatten(0, -2), u.flatten(0, -2), w, eps)
    return h.view_as(x), y.view_as(x)
