"""SwiGLU's product (arXiv 2002.05202), in one pass each for forward and backward. Import only if Triton can run.

    y = silu(gate) * up,  silu(x) = x * sigmoid(x)

Computed in float32 and rounded once, when a result is stored. Backward computes silu again, so that only gate and up are kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadyn.kernels.launch import has_values

BLOCK = 2048
"""Elements of one program: 16 for each of its 128 threads."""


@triton.jit
def _forward(gate, up, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # 64 bits, because size may exceed 2^31
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_y, gate, up, grad_gate, grad_up, size, BLOCK: tl.constexpr):
    """grad_up = grad_y silu(gate), grad_gate = grad_y up silu'(gate), silu' = s + silu (1 - s), s = sigmoid."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    silu = g * share
    tl.store(grad_up + at, (grad * silu).to(grad_up.dtype.element_ty), mask=inside)
    slope = share + silu * (1 - share)
    tl.store(grad_gate + at, (grad * u * slope).to(grad_gate.dtype.element_ty), mask=inside)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y, size = torch.empty_like(gate), gate.numel()
        if size and has_values(gate, moved=3 * gate.nbytes):
            _forward[(triton.cdiv(size, BLOCK),)](gate, up, y, size, BLOCK=BLOCK)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, size = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        if size and has_values(gate, moved=5 * gate.nbytes):
            _backward[(triton.cdiv(size, BLOCK),)](
                grad_y.contiguous(), gate, up, grad_gate, grad_up, size, BLOCK=BLOCK
            )
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both of the same shape and dtype."""
    y: Tensor = _Swiglu.apply(gate, up)
    return y
