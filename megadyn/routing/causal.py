"""The running threshold, a causal stand-in for top-k, which looks at the future and so cannot generate."""

import torch
from torch import Tensor

from megadyn.routing.tracker import StepTracker


class RunningThreshold(StepTracker):
    """tau: route iff score >= tau. A bias-corrected running average, over training steps, of the mean k-th highest score."""

    def __init__(self, momentum: float, average: Tensor | None = None, steps: int = 0):
        super().__init__()
        self.momentum = momentum
        self.average = torch.zeros(()) if average is None else average
        self.steps = steps

    def end_step(self, mean: Tensor, total: Tensor | None = None, rate: float = 0.0) -> None:
        """Takes a step's mean over all its sequences into the average."""
        self.average = self.average.to(mean.device) * self.momentum + mean * (1 - self.momentum)
        self.steps += 1

    @property
    def value(self) -> Tensor:
        """tau, a scalar tensor; 0 before the first step."""
        return self.average / (1 - self.momentum**self.steps) if self.steps else self.average

    def state(self) -> dict[str, float]:
        return {"average": float(self.average), "steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.average, self.steps = torch.tensor(state["average"], device=device), int(state["steps"])
