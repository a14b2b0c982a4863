"""Holds a DTRNet layer's share of attending tokens at a target by moving the weight of its attention loss."""

import torch
from torch import Tensor

PROPORTIONAL = 1e-2
"""How far lambda stands from its resting value for an error of 1."""
INTEGRAL = 5e-3
"""How far the resting value moves for an error of 1, per step and unit of the router's learning rate. lambda sets how fast a
share moves, so the integral alone would swing around the target: the proportional part damps it. Both the share's speed and
the integral's go with the rate, so the damping is the same at any rate, and a long warm-up winds nothing up."""
LARGEST = 2.0
"""Largest error that counts: three times the target. The smallest is -1, no attention at all."""
SOFT = 4.0
"""Logit difference at which the preference has a quarter of its slope at 0, which is that of p0."""
FAR, PULL = 10.0, 1e-4
"""Logit differences beyond FAR are pulled back by PULL times the square of the excess."""


class ShareController:
    """lambda of one layer: rest + PROPORTIONAL e, and per step rest += INTEGRAL rate e, for e = share / target - 1.

    Both stay within [-limit, limit]. A share that is too low makes lambda negative: the loss then rewards attention, because
    tokens that all prefer the bypass do not come back for want of a push the other way.
    Everything stays on the device, and follows from a share that is equal on all ranks, so lambda is too.
    """

    def __init__(self, target: float, start: float, limit: float):
        self.target, self.limit = target, limit
        self.rest = torch.tensor(start)
        self.value = torch.tensor(start)
        """lambda."""

    def end_step(self, share: Tensor, rate: float) -> None:
        """`share`: of tokens that attended in the layer in this step, over all its sequences; `rate`: the router's learning
        rate."""
        error = (share / self.target - 1).clamp(max=LARGEST)
        self.rest = (self.rest.to(share.device) + INTEGRAL * rate * error).clamp(-self.limit, self.limit)
        self.value = (self.rest + PROPORTIONAL * error).clamp(-self.limit, self.limit)

    def state(self) -> dict[str, float]:
        return {"lambda": float(self.value), "lambda_rest": float(self.rest)}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        """A state without lambda is of a run without a target: then the start stays."""
        self.value = torch.tensor(state.get("lambda", float(self.value)), device=device)
        self.rest = torch.tensor(state.get("lambda_rest", float(self.rest)), device=device)


def preference(lead: Tensor) -> Tensor:
    """Mean of d / (SOFT + |d|) for logit differences d [B, T], a scalar in (-1, 1): what lambda multiplies in place of mean p0.

    The gradient of p0 is p0 p1, and 0 in float32 where one of them has underflowed: no lambda could bring such tokens back.
    This one falls only with the square of d.
    """
    return (lead / (SOFT + lead.abs())).mean()


def excess(lead: Tensor) -> Tensor:
    """PULL mean(max(0, |d| - FAR)^2) for d [B, T]: keeps logit differences where the preference can still move them."""
    return PULL * (lead.abs() - FAR).clamp(min=0).square().mean()
