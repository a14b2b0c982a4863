"""DTRNet's auxiliary loss: the more a layer attends, the more it is pushed to attend less; or each layer follows a target."""

import torch
from torch import Tensor

from megadyn.kinds.dtrnet.share import ShareController, preference
from megadyn.routing.tracker import StepTracker


class AttentionLoad(StepTracker):
    """This layer's term of lambda * sum_l f_l mean(p0_l) / sum_l f_l (arXiv 2509.00925), where f_l is the share of
    tokens that attended.

    The f_l are those of the previous step, for all layers on all stages and ranks (equal shares in the first step). So
    no micro-batch waits for a collective, and the loss does not depend on the layout.

    With a controller the sum is sum_l lambda_l x_l / layers, where x_l is `share.preference`, and each layer has its
    own lambda that keeps f_l at its target. It is not weighted by f_l, because a layer far below its target would
    hardly be pushed.
    """

    def __init__(self, layers: int, weight: float, warmup: int, controller: ShareController | None = None):
        super().__init__()
        self.layers = layers
        self.share = torch.tensor(1 / layers)
        self.steps = 0
        self.weight, self.warmup, self.controller = weight, warmup, controller

    @property
    def part(self) -> Tensor:
        """This layer's weight in the sum over layers."""
        return self.share if self.controller is None else torch.tensor(1 / self.layers)

    @property
    def value(self) -> Tensor:
        """lambda, before the warm-up."""
        return torch.tensor(self.weight) if self.controller is None else self.controller.value

    def pushed(self, lead: Tensor) -> Tensor:
        """What lambda multiplies, from the logit differences [B, T/seq] of a micro-batch: mean p0, or the preference if
        there is a controller."""
        return lead.sigmoid().mean() if self.controller is None else preference(lead)

    def loss(self, pushed: Tensor) -> Tensor:
        """This layer's term, given a micro-batch's `pushed`."""
        rising = min(1.0, (self.steps + 1) / self.warmup) if self.warmup else 1.0
        return self.value.to(pushed) * rising * self.part.to(pushed) * pushed

    def end_step(self, mean: Tensor, total: Tensor | None, rate: float = 0.0) -> None:
        """`mean`: f of this layer in the step; `total`: its sum over all layers; `rate`: the router's learning rate in
        the step. If no token attended in any layer, the shares stay equal."""
        assert total is not None, "a name in Kind.totals"
        self.share = torch.where(total > 0, mean / total, self.share.to(mean.device))
        self.steps += 1
        if self.controller is not None:
            self.controller.end_step(mean, rate)

    def state(self) -> dict[str, float]:
        controlled = {} if self.controller is None else self.controller.state()
        return {"share": float(self.share), "steps": self.steps, **controlled}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.share = torch.tensor(state["share"], device=device)
        self.steps = int(state["steps"])
        if self.controller is not None:
            self.controller.set_state(state, device)
