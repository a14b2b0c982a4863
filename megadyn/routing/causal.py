"""The running threshold, a causal stand-in for top-k, which looks at the future and so cannot generate."""

import torch
from torch import Tensor

from megadyn.routing.select import Selection, take
from megadyn.routing.tracker import StepTracker


class RunningThreshold(StepTracker):
    """tau: route iff score >= tau. A bias-corrected running average, over training steps, of the mean k-th highest score.

    It is kept in float64: where scores stand still, rounding would else lift it above them after some steps, and no token would
    be routed.
    """

    dtype = torch.float64  # the mean of equal numbers is then that number, however many there are

    def __init__(self, momentum: float, average: float = 0.0, steps: int = 0):
        super().__init__()
        self.momentum = momentum
        self.average = torch.tensor(average, dtype=torch.float64)
        self.steps = steps

    @staticmethod
    def lowest(score: Tensor, top: Selection) -> Tensor:
        """Mean over sequences of the lowest score [B, T] that top-k took."""
        return take(score, top.places).amin(dim=1).double().mean()

    def watch(self, score: Tensor, top: Selection | None) -> None:
        """Observes a micro-batch of training: its scores [B, T] and what top-k took, where training goes by that."""
        assert top is not None
        self.observe(self.lowest(score, top))

    def end_step(self, mean: Tensor, total: Tensor | None = None, rate: float = 0.0) -> None:
        """Takes a step's mean over all its sequences into the average."""
        self.average = self.average.to(mean.device) * self.momentum + mean * (1 - self.momentum)
        self.steps += 1

    @property
    def value(self) -> Tensor:
        """tau, a scalar in float32, as scores are; 0 before the first step."""
        return (self.average / (1 - self.momentum**self.steps) if self.steps else self.average).float()

    def state(self) -> dict[str, float]:
        return {"average": float(self.average), "steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.average, self.steps = (
            torch.tensor(state["average"], dtype=torch.float64, device=device),
            int(state["steps"]),
        )
