"""Causal stand-ins for top-k, which looks at the future and so cannot generate."""

import torch
from torch import Tensor


class RunningThreshold:
    """tau: route iff score >= tau. A bias-corrected running average, over training steps, of the mean k-th highest score.

    A plain object, not a module: the engine casts modules' buffers to half precision, and an average with
    momentum 0.99 would stand still there. A step's micro-batches are averaged before they enter, so the
    average does not depend on how a step is split.
    """

    def __init__(self, momentum: float, average: Tensor | None = None, steps: int = 0):
        self.momentum = momentum
        self.average = torch.zeros(()) if average is None else average
        self.steps = steps
        self._sum: Tensor | None = None
        self._count = 0

    def observe(self, kth_score: Tensor) -> None:
        """kth_score [B]: each sequence's lowest chosen score in one micro-batch."""
        mean = kth_score.detach().float().mean()
        self._sum = mean if self._sum is None else self._sum + mean
        self._count += 1

    def take_step_mean(self) -> Tensor:
        """Mean of what the step's micro-batches on this rank showed; forgets them."""
        assert self._sum is not None, "end of a step without a forward pass"
        mean, self._sum, self._count = self._sum / self._count, None, 0
        return mean

    def end_step(self, mean: Tensor) -> None:
        """Takes a step's mean over all its sequences into the average."""
        self.average = self.average.to(mean.device) * self.momentum + mean * (1 - self.momentum)
        self.steps += 1

    @property
    def value(self) -> Tensor:
        """tau, a scalar tensor; 0 before the first step."""
        return self.average / (1 - self.momentum**self.steps) if self.steps else self.average
