"""Keeps a DTRNet layer's share of attending tokens at a target by adjusting the weight of its attention loss."""

import torch
from torch import Tensor

PROPORTIONAL = 1e-2
"""Distance of lambda from its resting value for an error of 1."""
INTEGRAL = 5e-3
"""Change of the resting value for an error of 1, per step and unit of the router's learning rate. lambda determines the
speed of the share, so the integral part alone would oscillate around the target; the proportional part damps it. The
speeds of the share and of the integral are both proportional to the rate, so damping does not depend on it, and a long
warm-up causes no wind-up."""
LARGEST = 2.0
"""Errors are clipped to this: three times the target. The smallest possible error is -1, no attention at all."""
SOFT = 4.0
"""Logit difference at which the preference's slope has fallen to a quarter of that at 0, which equals p0's slope."""
FAR, PULL = 10.0, 1e-4
"""Logit differences beyond FAR are pulled back by PULL times the square of the excess."""


class ShareController:
    """lambda of one layer: rest + PROPORTIONAL e, and per step rest += INTEGRAL rate e, where e = share / target - 1.

    Both stay within [-limit, limit]. If the share is too low, lambda becomes negative and the loss rewards attention.
    Without that push, tokens that all prefer the bypass would not come back.
    Everything stays on the device and depends only on a share that is equal on all ranks, so lambda is equal too.
    """

    def __init__(self, target: float, start: float, limit: float):
        self.target, self.limit = target, limit
        self.rest = torch.tensor(start)
        self.value = torch.tensor(start)
        """lambda."""

    def end_step(self, share: Tensor, rate: float) -> None:
        """`share`: of tokens that attended in the layer in this step, over all its sequences. `rate`: the router's
        learning rate."""
        error = (share / self.target - 1).clamp(max=LARGEST)
        self.rest = (self.rest.to(share.device) + INTEGRAL * rate * error).clamp(-self.limit, self.limit)
        self.value = (self.rest + PROPORTIONAL * error).clamp(-self.limit, self.limit)

    def state(self) -> dict[str, float]:
        return {"lambda": float(self.value), "lambda_rest": float(self.rest)}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        """A state without lambda comes from a run without a target; lambda then keeps its initial value."""
        self.value = torch.tensor(state.get("lambda", float(self.value)), device=device)
        self.rest = torch.tensor(state.get("lambda_rest", float(self.rest)), device=device)


def preference(lead: Tensor) -> Tensor:
    """Mean of d / (SOFT + |d|) for logit differences d [B, T], a scalar in (-1, 1). lambda multiplies it instead of mean p0.

    The gradient of p0 is p0 p1, which is 0 in float32 once one of them has underflowed; then no lambda could bring such
    tokens back. This gradient only falls with the square of d.
    """
    return (lead / (SOFT + lead.abs())).mean()


def excess(lead: Tensor) -> Tensor:
    """PULL mean(max(0, |d| - FAR)^2) for d [B, T]: keeps logit differences in the range where the preference has an effect."""
    return PULL * (lead.abs() - FAR).clamp(min=0).square().mean()
