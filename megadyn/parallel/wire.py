"""What is sent between pipeline stages, packed into one tensor: the hidden state, with score and document ids in extra columns.

DeepSpeed runs the backward pass of a stage that sends two float tensors twice (once for each). So between a Decision
and its Dynamic layer the score, which determines the gate, is sent in columns of the hidden state. It stays float32:
its bits are reinterpreted, not converted, both as value and as gradient. Document ids, which have no gradient, are sent
likewise as int32 bits. Nothing may compute on the packed tensor.
"""

from typing import Any

import torch
from torch import Tensor


def _columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of x [B, T] as columns [B, T, n] of another dtype, which is not wider than its own."""
    return x.unsqueeze(-1).contiguous().view(dtype)


def _values(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_columns`."""
    return columns.contiguous().view(dtype).squeeze(-1)


def _types(dtype: torch.dtype, gate: bool, ids: bool) -> list[torch.dtype]:
    """Dtypes of the extra columns of a hidden state of type `dtype`."""
    id_type = torch.int64 if dtype == torch.float64 else torch.int32
    return [torch.promote_types(dtype, torch.float32)] * gate + [id_type] * ids


def _split(packed: Tensor, types: list[torch.dtype]) -> list[Tensor]:
    widths = [t.itemsize // packed.dtype.itemsize for t in types]
    hidden, *extras = packed.split([packed.shape[-1] - sum(widths), *widths], dim=-1)
    return [hidden.contiguous(), *(_values(columns, t) for columns, t in zip(extras, types))]


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gate: Tensor | None, ids: Tensor | None) -> Tensor:
        ctx.has = (gate is not None, ids is not None)
        types = _types(hidden.dtype, *ctx.has)
        extras = [x for x in (gate, ids) if x is not None]
        return torch.cat([hidden, *(_columns(x.to(t), hidden.dtype) for x, t in zip(extras, types))], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *extras = _split(grad, _types(grad.dtype, *ctx.has))
        return hidden, extras[0] if ctx.has[0] else None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, gate: bool, ids: bool) -> tuple[Tensor, ...]:
        ctx.width, ctx.has_gate = packed.shape[-1], gate
        hidden, *extras = _split(packed, _types(packed.dtype, gate, ids))
        if ids:
            extras[-1] = extras[-1].long()
            ctx.mark_non_differentiable(extras[-1])
        return hidden, *extras

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate = [_columns(grads[0], grad_hidden.dtype)] if ctx.has_gate else []
        known = torch.cat([grad_hidden, *gate], dim=-1)
        return torch.nn.functional.pad(known, (0, ctx.width - known.shape[-1])), None, None


def pack(hidden: Tensor, gate: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """hidden [B, T, D], gate [B, T] in float32 or wider, document ids [B, T] -> [B, T, D + columns]."""
    return hidden if gate is None and ids is None else _Pack.apply(hidden, gate, ids)


def unpack(packed: Tensor, *, gate: bool, ids: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The inverse of `pack`; `gate` and `ids` say which of the two were packed."""
    if not (gate or ids):
        return packed, None, None
    hidden, *extras = _Unpack.apply(packed, gate, ids)
    return hidden, extras[0] if gate else None, extras[-1] if ids else None
