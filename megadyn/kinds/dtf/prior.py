"""DTF's prior, a cheap prediction of a Decision layer's update, and the distances of the layer's output from input and prior."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megadyn.kernels.rule import fused
from megadyn.model.block import swiglu
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
        x, post, shape = hidden.flatten(0, -2), post.flatten(0, -2), hidden.shape[:-1]  # [N, D]
        normed = F.rms_norm(x, norm.shape, norm, eps)
        gate, up = normed @ gate_proj.T, normed @ up_proj.T  # [N, W]
        predicted = swiglu(gate, up) @ down_proj.T
        static, change, error, inverse = distances(x, post, predicted, eps)
        ctx.save_for_backward(x, post, error, inverse, gate, up, norm, gate_proj, up_proj, down_proj)
        return static.view(shape), change.view(shape), change.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_static: Tensor, d_change: Tensor, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, post, error, inverse, gate, up, norm, gate_proj, up_proj, down_proj = ctx.saved_tensors
        shape, size = (*d_static.shape, x.shape[-1]), x.shape[-1]
        of_static, of_change = (2 / size * d.flatten() for d in (d_static, d_change))  # [N]
        of_both = of_change + 2 / size * d_loss / len(x)

        # Backward through the prior with -error as gradient of its output; its tensors are narrow.
        inner, for_weights, for_input, along = inner_gradients(
            gate, up, error @ down_proj, of_both, of_change, inverse, size
        )
        both_proj = torch.cat([gate_proj, up_proj])  # [2 W, D]

        # The norm's factors are applied to the narrow tensors as well: its output is x * inverse * norm.
        by_x = for_weights.T @ x  # [2 W, D]
        d_gate_proj, d_up_proj = (by_x * norm).split(len(gate_proj))
        d_norm = (upcast(by_x) * both_proj).sum(dim=0).to(x.dtype)
        d_down_proj = -(error.T @ inner)  # [D, W]

        pulled = for_input @ (both_proj * norm)
        d_hidden, d_post = outer_gradients(x, post, error, pulled, of_static, of_change, along)
        return (
            d_hidden.view(shape),
            d_post.view(shape),
            None,
            d_norm,
            d_gate_proj,
            d_up_proj,
            d_down_proj,
        )


# ---- what is not a product: one kernel each if `training.kernels` selects Triton -----------------------
# Shapes and results are those of the functions of the same names in `kernels/distances.py`.


def distances(
    x: Tensor, post: Tensor, predicted: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if fused(x):
        from megadyn.kernels import distances as kernels

        return kernels.distances(x, post, predicted, eps)
    update = upcast(post) - x
    error = update - predicted
    static, change = mean_square(update), mean_square(error)
    return static, change, error.to(x.dtype), (mean_square(upcast(x)) + eps).rsqrt()


def inner_gradients(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    of_weights: Tensor,
    of_input: Tensor,
    inverse: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if fused(gate):
        from megadyn.kernels import distances as kernels

        return kernels.inner_gradients(gate, up, grad, of_weights, of_input, inverse, size)
    dtype = gate.dtype
    gate, up = upcast(gate), upcast(up)
    of_weights, of_input, scale = (factor.unsqueeze(1) for factor in (of_weights, of_input, inverse))
    share = gate.sigmoid()
    silu = gate * share
    d_inner = -upcast(grad)
    d_gate, d_up = d_inner * up * (share + silu * (1 - share)), d_inner * silu
    inward = torch.cat([d_gate, d_up], dim=1)  # [N, 2 W]
    along = (d_gate * gate + d_up * up).sum(dim=1, keepdim=True) * scale.square() / size
    return (
        (of_weights * silu * up).to(dtype),
        (of_weights * scale * inward).to(dtype),
        (of_input * scale * inward).to(dtype),
        (of_input * along).squeeze(1),
    )


def outer_gradients(
    x: Tensor,
    post: Tensor,
    error: Tensor,
    pulled: Tensor,
    of_static: Tensor,
    of_change: Tensor,
    along: Tensor,
) -> tuple[Tensor, Tensor]:
    if fused(x):
        from megadyn.kernels import distances as kernels

        return kernels.outer_gradients(x, post, error, pulled, of_static, of_change, along)
    of_static, of_change, along = (factor.unsqueeze(1) for factor in (of_static, of_change, along))
    d_post = (upcast(post) - x).mul_(of_static).addcmul_(error, of_change)
    d_hidden = upcast(pulled).sub_(d_post).addcmul_(x, -along)
    return d_hidden.to(x.dtype), d_post.to(x.dtype)


def mean_square(x: Tensor) -> Tensor:
    """[N, D] -> [N]."""
    return torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
