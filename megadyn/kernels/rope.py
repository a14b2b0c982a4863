"""Turns the heads of queries or keys to their positions (arXiv 2104.09864), in one pass. Import only if Triton can run.

The first half of a head and its second half are the two coordinates of K / 2 pairs:

    out = (a cos - b sin, b cos + a sin) for x = (a, b)

Backward is the turn by the opposite angles. Computed in float32, rounded once. A program handles several heads of one token.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadyn.kernels.launch import has_values

BLOCK = 1024
"""Pairs that one program turns at once."""


@triton.jit
def _turn(x, cos, sin, out, angles, heads, half, back: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """`angles`: rows of cos and sin, which repeat over the tokens. `back`: turn by the opposite."""
    token = tl.program_id(0).to(tl.int64)  # 64 bits, because tokens * heads * K may exceed 2^31
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    angle = (token % angles) * half + column
    c = tl.load(cos + angle, mask=column < half, other=0.0)
    s = tl.load(sin + angle, mask=column < half, other=0.0)
    if back:
        s = -s
    at = (token * heads + head) * 2 * half + column
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    tokens, heads, half = x.shape[0] * x.shape[1], x.shape[2], x.shape[3] // 2
    if x.numel() and has_values(x, moved=2 * x.nbytes + cos.nbytes + sin.nbytes):
        width = triton.next_power_of_2(half)
        block = min(triton.next_power_of_2(heads), max(1, BLOCK // width))
        angles = cos.numel() // half
        grid = (tokens, triton.cdiv(heads, block))
        _turn[grid](x, cos, sin, out, angles, heads, half, back=back, HEADS=block, HALF=width)
    return out


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad, *ctx.saved_tensors, back=True), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, heads, K] turned by angles whose cos and sin are [S, K / 2] or [B, S, K / 2], in float32."""
    out: Tensor = _Turn.apply(x, cos, sin)
    return out
