"""What processing a token is worth, learned from the loss; and how far a score ranks tokens otherwise."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.model.block import LayerContext
from megadyn.parallel.linear import upcast
from megadyn.parallel.params import constant


class _Watch(torch.autograd.Function):
    """Returns the gate. Its backward pass sends `predicted` the gradient of half the mean square of its error, where tokens
    were processed: the target is -gate * dL/dgate, the first-order gain of having processed the token, over its root mean
    square."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, predicted: Tensor, taken: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(gate, predicted, taken)
        ctx.scale = scale
        return gate.view_as(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, predicted, taken = ctx.saved_tensors
        gain = torch.where(taken, -grad * gate, 0)
        count = taken.sum().clamp(min=1)
        size = (gain.square().sum() / count).sqrt().clamp(min=1e-30)
        error = torch.where(taken, predicted - (gain / size).clamp(-3, 3), 0)
        return grad, error * (ctx.scale / count), None, None


class Utility(nn.Module):
    """u = w . h / rms(h) [B, T], trained on the tokens that the layer processed."""

    def __init__(self, name: str, ctx: LayerContext):
        super().__init__()
        self.weight = ctx.make(f"{name}.weight", (1, ctx.model.hidden_size), constant(0.0))

    def forward(self, hidden: Tensor) -> Tensor:
        h = upcast(hidden.detach())
        return F.linear(h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), upcast(self.weight)).squeeze(
            -1
        )

    def watch(self, gate: Tensor, predicted: Tensor, taken: Tensor, scale: float) -> Tensor:
        return _Watch.apply(gate, predicted, taken, scale)


def disagreement(score: Tensor, utility: Tensor) -> Tensor:
    """Mean of softplus(-(r_i - r_j)) over pairs with u_i > u_j, where r [B, T] is divided by its standard deviation over the
    sample. Pairs are 1, 2, 4, ... tokens apart."""
    score = score / (score.std(dim=1, keepdim=True) + 1e-6)
    losses, shift = [], 1
    while shift < score.shape[1]:
        first = score[:, shift:] - score[:, :-shift]
        sign = (utility[:, shift:] - utility[:, :-shift]).sign()
        losses.append(F.softplus(-first * sign)[sign != 0])
        shift *= 2
    found = torch.cat(losses)
    return found.mean() if len(found) else score.sum() * 0


def agreement(score: Tensor, utility: Tensor) -> Tensor:
    """Share of pairs that both rank alike."""
    parts, shift = [], 1
    while shift < score.shape[1]:
        parts.append(
            ((score[:, shift:] > score[:, :-shift]) == (utility[:, shift:] > utility[:, :-shift]))
            .float()
            .flatten()
        )
        shift *= 2
    return torch.cat(parts).mean()
