"""A hidden state and its gate as one tensor, for the cut between a Decision and its Dynamic layer.

A pipeline stage that sends two float tensors runs its backward pass twice (once for each), so the gate rides
in extra columns of the hidden state. It stays float32: its bits are reinterpreted, not converted, both as
value and as gradient. Nothing may compute on the packed tensor.
"""

from typing import Any

import torch
from torch import Tensor


def _join(hidden: Tensor, gate: Tensor) -> Tensor:
    return torch.cat([hidden, gate.unsqueeze(-1).contiguous().view(hidden.dtype)], dim=-1)


def _split(packed: Tensor, gate_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    columns = gate_dtype.itemsize // packed.dtype.itemsize
    hidden, bits = packed.split([packed.shape[-1] - columns, columns], dim=-1)
    return hidden.contiguous(), bits.contiguous().view(gate_dtype).squeeze(-1)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gate: Tensor) -> Tensor:
        ctx.gate_dtype = gate.dtype
        return _join(hidden, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _split(grad, ctx.gate_dtype)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, Tensor]:
        return _split(packed, torch.promote_types(packed.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_gate: Tensor) -> Tensor:
        return _join(grad_hidden, grad_gate)


def pack(hidden: Tensor, gate: Tensor) -> Tensor:
    """hidden [B, T, D], gate [B, T] of at least float32 -> [B, T, D + 1 or 2]."""
    return _Pack.apply(hidden, gate)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`."""
    return _Unpack.apply(packed)
