"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama and Qwen2."""

from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Turns queries and keys by their token's original position. Holds a table, no parameters."""

    def __init__(self, head_dim: int, theta: float):
        self.head_dim, self.theta = head_dim, theta
        self.cos = self.sin = torch.empty(0)

    def angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [length, head_dim / 2], in at least float32; grown and kept for the next call."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.cos.shape[0] < length or self.cos.device != like.device or self.cos.dtype != dtype:
            exponent = torch.arange(0, self.head_dim, 2, dtype=dtype, device=like.device) / self.head_dim
            positions = torch.arange(length, dtype=dtype, device=like.device)
            angle = torch.outer(positions, self.theta**-exponent)
            self.cos, self.sin = angle.cos(), angle.sin()
        return self.cos[:length], self.sin[:length]

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """q, k [B, S, heads, head_dim] turned.

        Args:
            positions: [B, S], each below `length`; None stands for 0 .. S-1.
        """
        cos, sin = self.angles(length, q)
        cos, sin = (
            (cos[: q.shape[1]], sin[: q.shape[1]]) if positions is None else (cos[positions], sin[positions])
        )
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # over all heads alike
        return _Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin)


class _Turn(torch.autograd.Function):
    """Keeps only the angles: the way back is the turn by their opposite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both halves at once, and each then gets its share of the other, in the type of cos and sin."""
    pair = x.unflatten(-1, (2, -1))
    out = pair * cos.unsqueeze(-2)
    out[..., 0, :].addcmul_(pair[..., 1, :], sin, value=-1)
    out[..., 1, :].addcmul_(pair[..., 0, :], sin)
    return out.flatten(-2).to(x.dtype)
