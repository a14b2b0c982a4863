"""DTF's prior, a cheap prediction of a Decision layer's update, and the distances of the layer's output from input and prior."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.parallel.linear import upcast
from megadyn.parallel.mappings import copy_to_tp
from megadyn.parallel.params import ParamMaker, constant, normal


class Prior(nn.Module):
    """PriorFFN(RMSNorm(h)), a narrow SwiGLU without biases; not cut over tensor ranks. It holds all four weights
    itself, without submodules: one function uses them all, and ZeRO-3 gathers only the weights of the running
    module."""

    def __init__(self, name: str, hidden_size: int, width: int, eps: float, *, make: ParamMaker):
        super().__init__()
        self.eps, self.seq, init = eps, make.seq, normal(0.02)
        self.norm = make(f"{name}.norm.weight", (hidden_size,), constant(1.0))
        self.gate_proj = make(f"{name}.gate_proj.weight", (width, hidden_size), init)
        self.up_proj = make(f"{name}.up_proj.weight", (width, hidden_size), init)
        self.down_proj = make(f"{name}.down_proj.weight", (hidden_size, width), init)

    def forward(self, hidden: Tensor, post: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input h and the layer's output post, [B, T, D] -> D_st and D_ch [B, T] and the prior's loss, in float32 or wider.

        D_st = mean (post - h)^2 and D_ch = mean (post - prior)^2, prior = h + PriorFFN(RMSNorm(h)). The loss is the mean of
        D_ch, but its gradient reaches only the prior's weights.
        """
        weights = (
            copy_to_tp(weight, self.seq)
            for weight in (self.norm, self.gate_proj, self.up_proj, self.down_proj)
        )
        return _Surprise.apply(hidden, post, self.eps, *weights)


class _Surprise(torch.autograd.Function):
    """Runs the prior once forward and once backward, for surprise and loss together.

    For each token, both gradients into the prior are the same vector, post - prior, times a scalar; and backward
    through the prior is linear. So it runs once, without these scalars, and each result is then scaled by its own: the
    weights by the sum of both, the input by the surprise's only.

    N tokens, D hidden size, W the prior's width.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        post: Tensor,
        eps: float,
        norm: Tensor,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, size = hidden.flatten(0, -2), hidden.shape[-1]  # [N, D]
        normed = F.rms_norm(x, norm.shape, norm, eps)
        gate, up = normed @ gate_proj.T, normed @ up_proj.T  # [N, W]
        update = upcast(post).flatten(0, -2) - x
        error = update - (F.silu(gate) * up) @ down_proj.T
        static, change = (torch.linalg.vector_norm(v, dim=-1).square() / size for v in (update, error))
        ctx.eps = eps
        ctx.save_for_backward(
            x, update.to(x.dtype), error.to(x.dtype), gate, up, norm, gate_proj, up_proj, down_proj
        )
        shape = hidden.shape[:-1]
        return static.view(shape), change.view(shape), change.mean()

    @staticmethod
    def backward(ctx: Any, d_static: Tensor, d_change: Tensor, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, update, error, gate, up, norm, gate_proj, up_proj, down_proj = ctx.saved_tensors
        shape, dtype, size = (*d_static.shape, x.shape[-1]), x.dtype, x.shape[-1]
        of_static, of_change = (2 / size * d.reshape(-1, 1) for d in (d_static, d_change))  # [N, 1]
        of_both = of_change + 2 / size * d_loss / len(x)

        # Backward through the prior with -error as gradient of its output. From here on tensors are narrow, [N, W].
        gate, up = upcast(gate), upcast(up)
        share = gate.sigmoid()
        silu = gate * share
        d_inner = -upcast(error @ down_proj)
        d_gate, d_up = d_inner * up * (share + silu * (1 - share)), d_inner * silu
        inward = torch.cat([d_gate, d_up], dim=1)  # [N, 2 W]
        both_proj = torch.cat([gate_proj, up_proj])  # [2 W, D]

        # The norm's factors are applied to the narrow tensors as well: its output is x * scale * norm.
        scale = (torch.linalg.vector_norm(upcast(x), dim=1, keepdim=True).square() / size + ctx.eps).rsqrt()
        by_x = (of_both * scale * inward).to(dtype).T @ x  # [2 W, D]
        d_gate_proj, d_up_proj = (by_x * norm).split(len(gate_proj))
        d_norm = (upcast(by_x) * both_proj).sum(dim=0).to(dtype)
        d_down_proj = -(error.T @ (of_both * silu * up).to(dtype))  # [D, W]

        d_post = (of_static * update).addcmul_(error, of_change)
        along = (d_gate * gate + d_up * up).sum(dim=1, keepdim=True) * scale.square() / size
        d_hidden = upcast((of_change * scale * inward).to(dtype) @ (both_proj * norm))
        d_hidden.sub_(d_post).addcmul_(x, -of_change * along)
        return (
            d_hidden.to(dtype).view(shape),
            d_post.to(dtype).view(shape),
            None,
            d_norm,
            d_gate_proj,
            d_up_proj,
            d_down_proj,
        )
