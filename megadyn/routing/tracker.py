"""Averages that a layer carries from step to step."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class StepTracker(ABC):
    """Collects a scalar, or a vector, from every micro-batch of a step; the engine averages it over data-parallel ranks and
    hands it back.

    A plain object, not a module: the engine casts modules' buffers to half precision. A step's micro-batches are
    averaged before they count, so nothing depends on how a step is split.
    """

    dtype = torch.float32
    """Of the means, and of what they are taken into."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.micro_batches = 0
        """Of this step, so far."""

    @abstractmethod
    def end_step(self, mean: Tensor, total: Tensor | None, rate: float = 0.0) -> None:
        """Takes in a step: `mean` over its samples of what was observed; `total`: the sum of these over all layers
        of the model, where `Kind.totals` names this tracker; `rate`: the routers' learning rate in the step."""

    @abstractmethod
    def state(self) -> dict[str, float]:
        """What a checkpoint holds of it."""

    @abstractmethod
    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        """Inverse of `state`."""

    def observe(self, value: Tensor) -> None:
        """A scalar or a vector of one micro-batch; a mean over its samples."""
        value = value.detach().to(self.dtype)
        self._sum = value if self._sum is None else self._sum + value
        self.micro_batches += 1

    def forget(self) -> None:
        """Begins the step anew."""
        self._sum, self.micro_batches = None, 0

    def take_step_mean(self) -> Tensor:
        """Mean of what the step's micro-batches on this rank showed; forgets them."""
        assert self._sum is not None, "end of a step without a forward pass"
        mean, self._sum, self.micro_batches = self._sum / self.micro_batches, None, 0
        return mean


class StepCount(StepTracker):
    """How many steps there were; `micro_batches` says which micro-batch of the step this is."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def end_step(self, mean: Tensor, total: Tensor | None, rate: float = 0.0) -> None:
        self.steps += 1

    def state(self) -> dict[str, float]:
        return {"steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.steps = int(state["steps"])
