"""Muon written plainly: whole matrices, one process, float64, by the singular values instead of an iteration over matrices."""

import torch
from torch import Tensor, nn

A, B, C = 3.4445, -4.7750, 2.0315


def made_orthogonal(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz moves singular values alone, each by the odd polynomial a s + b s^3 + c s^5."""
    left, values, right = (update.double() / update.double().norm()).svd()
    for _ in range(steps):
        values = A * values + B * values**3 + C * values**5
    return left @ values.diag() @ right.T


def muon_step(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    *,
    rate: float,
    decay: float,
    mu: float = 0.95,
    steps: int = 5,
) -> tuple[Tensor, Tensor]:
    """The next weight and momentum, float64."""
    momentum = mu * momentum.double() + gradient.double()
    update = made_orthogonal(gradient.double() + mu * momentum, steps)
    scale = 0.2 * max(weight.shape) ** 0.5
    return weight.double() * (1 - rate * decay) - rate * scale * update, momentum


class PlainMuon:
    """One matrix and its momentum."""

    def __init__(self, weight: nn.Parameter, factor: float = 1.0):
        """`factor`: of the learning rate."""
        self.weight, self.factor = weight, factor
        self.momentum = torch.zeros_like(weight, dtype=torch.float64)

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        gradient = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad
        weight, self.momentum = muon_step(
            self.weight, gradient, self.momentum, rate=rate * self.factor, decay=decay
        )
        self.weight.copy_(weight)
