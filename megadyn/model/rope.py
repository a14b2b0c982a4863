"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama and Qwen2."""

import math
from typing import Any

import torch
from torch import Tensor

from megadyn.config import RopeConfig
from megadyn.kernels.rule import fused


class Rotary:
    """Turns queries and keys by their token's original position, in one kernel each if `training.kernels` selects Triton.
    Holds a table, no parameters."""

    def __init__(self, head_dim: int, rope: RopeConfig):
        self.head_dim, self.rope = head_dim, rope
        self.cos = self.sin = torch.empty(0)
        self.reach = 0
        """Of `dynamic`: the length of sequence that the table is for, which the base follows."""

    def angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [length, head_dim / 2], in at least float32, times `yarn`'s factor; grown and kept for the next call."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        reach = max(length, self.rope.original_max_position or 0) if self.rope.type == "dynamic" else 0
        if (
            self.cos.shape[0] < length
            or self.reach != reach
            or self.cos.device != like.device
            or self.cos.dtype != dtype
        ):
            exponent = torch.arange(0, self.head_dim, 2, dtype=dtype, device=like.device) / self.head_dim
            positions = torch.arange(length, dtype=dtype, device=like.device)
            angle = torch.outer(positions, frequencies(self.rope, exponent, self.head_dim, length))
            self.cos, self.sin, self.reach = angle.cos(), angle.sin(), reach
            if self.rope.attention_factor is not None:
                self.cos, self.sin = (x * self.rope.attention_factor for x in (self.cos, self.sin))
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
        if fused(q):
            from megadyn.kernels.rope import turn

            return turn(q, cos, sin), turn(k, cos, sin)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # over all heads alike
        return _Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin)


def frequencies(rope: RopeConfig, exponent: Tensor, head_dim: int, length: int) -> Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2], for sequences of `length` tokens: rounded as by
    transformers, because at position 65536 another rounding turns a pair by 0.004 radians.

    Args:
        exponent: 0, 2/head_dim, ... of `theta`.
    """
    factor, original = rope.factor or 1.0, rope.original_max_position or 1
    if rope.type == "dynamic":
        stretch = factor * max(length, original) / original - (factor - 1)
        return 1.0 / (rope.theta * stretch ** (head_dim / (head_dim - 2))) ** exponent
    plain = 1.0 / rope.theta**exponent
    if rope.type == "default":
        return plain
    if rope.type == "linear":
        return plain / factor
    kept = llama3_kept(rope, plain) if rope.type == "llama3" else yarn_kept(rope, plain, head_dim)
    return plain / factor * (1 - kept) + plain * kept


def llama3_kept(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Share of each pair's frequency that stays: from 0 to 1 between `low_freq_factor` and `high_freq_factor` turns in the
    original context."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert rope.original_max_position and low and high
    turns = rope.original_max_position / (2 * math.pi / plain)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_kept(rope: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """As `llama3_kept`, but the share falls with the pair's number, between the whole numbers around the pairs that turn
    `beta_fast` and `beta_slow` times."""

    def pair(turns: float) -> float:
        assert rope.original_max_position
        wavelength = rope.original_max_position / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    assert rope.beta_fast and rope.beta_slow
    first, last = max(math.floor(pair(rope.beta_fast)), 0), min(math.ceil(pair(rope.beta_slow)), head_dim - 1)
    number = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    return 1 - ((number - first) / (last - first or 0.001)).clamp(0, 1)


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
