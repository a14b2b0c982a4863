"""DTRNet's auxiliary loss: layers that attend more are pushed more."""

import torch
from torch import Tensor

from megadyn.routing.tracker import StepTracker


class AttentionLoad(StepTracker):
    """This layer's term of lambda * sum_l f_l mean(p0_l) / sum_l f_l (arXiv 2509.00925), f_l being the fraction of tokens that
    attended.

    The f_l are those of the step before, of all layers on all stages and ranks (equal shares in the first step), so
    a micro-batch waits for no collective, and the loss depends on no layout.
    """

    def __init__(self, layers: int, weight: float, warmup: int):
        super().__init__()
        self.layers = layers
        self.share = torch.tensor(1 / layers)
        self.steps = 0
        self.weight, self.warmup = weight, warmup

    def loss(self, mean_attend: Tensor) -> Tensor:
        """The term for a micro-batch whose mean p0 in this layer is `mean_attend`."""
        rising = min(1.0, (self.steps + 1) / self.warmup) if self.warmup else 1.0
        return self.weight * rising * self.share.to(mean_attend) * mean_attend

    def end_step(self, mean: Tensor, total: Tensor | None) -> None:
        """`mean`: f of this layer in the step; `total`: the sum over all layers. No attention anywhere leaves equal shares be."""
        assert total is not None, "a name in Kind.totals"
        self.share = torch.where(total > 0, mean / total, self.share.to(mean.device))
        self.steps += 1

    def state(self) -> dict[str, float]:
        return {"share": float(self.share), "steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.share = torch.tensor(state["share"], device=device)
        self.steps = int(state["steps"])
