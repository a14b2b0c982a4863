"""Values that a layer accumulates over micro-batches: averages carried from step to step, and statistics for reports."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megadyn.routing.select import Selection, take


class StepTracker(ABC):
    """Collects a scalar or a vector from every micro-batch of a step. The engine averages it over data-parallel ranks
    and calls `end_step` with the result.

    Not a module, because the engine casts modules' buffers to half precision. A step's micro-batches are averaged
    first, so nothing depends on how a step is split.
    """

    dtype = torch.float32
    """Dtype of the means, and of the averages that take them in."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.micro_batches = 0
        """Micro-batches of this step so far."""

    @abstractmethod
    def end_step(self, mean: Tensor, total: Tensor | None, rate: float = 0.0) -> None:
        """Takes in a step. `mean`: mean over its samples of the observed values. `total`: sum of the means over all
        layers of the model, if `Kind.totals` names this tracker. `rate`: the routers' learning rate in this step."""

    @abstractmethod
    def state(self) -> dict[str, float]:
        """State to save in a checkpoint."""

    @abstractmethod
    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        """Inverse of `state`."""

    def observe(self, value: Tensor) -> None:
        """Records a micro-batch's scalar or vector, a mean over its samples."""
        value = value.detach().to(self.dtype)
        self._sum = value if self._sum is None else self._sum + value
        self.micro_batches += 1

    def forget(self) -> None:
        """Restarts the step."""
        self._sum, self.micro_batches = None, 0

    def take_step_mean(self) -> Tensor:
        """Mean over the step's micro-batches on this rank; then restarts."""
        assert self._sum is not None, "end of a step without a forward pass"
        mean, self._sum, self.micro_batches = self._sum / self.micro_batches, None, 0
        return mean


class StepCount(StepTracker):
    """Counts steps; `micro_batches` is the number of the micro-batch within the step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def end_step(self, mean: Tensor, total: Tensor | None, rate: float = 0.0) -> None:
        self.steps += 1

    def state(self) -> dict[str, float]:
        return {"steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.steps = int(state["steps"])


class RunningThreshold(StepTracker):
    """tau: route iff score >= tau. This causal rule replaces top-k, which looks at the future and so cannot be used in
    generation. tau is a bias-corrected running average, over training steps, of the mean k-th highest score.

    It is kept in float64: with constant scores, float32 rounding would push it above them after some steps, and no
    token would be routed.
    """

    dtype = torch.float64  # so that the mean of equal numbers is exactly that number

    def __init__(self, momentum: float, average: float = 0.0, steps: int = 0):
        super().__init__()
        self.momentum = momentum
        self.average = torch.tensor(average, dtype=torch.float64)
        self.steps = steps

    @staticmethod
    def lowest(score: Tensor, top: Selection) -> Tensor:
        """Mean over sequences of the lowest score [B, T] chosen by top-k."""
        return take(score, top.places).amin(dim=1).double().mean()

    def watch(self, score: Tensor, top: Selection | None) -> None:
        """Observes a training micro-batch: its scores [B, T] and, if training uses top-k, what that chose."""
        assert top is not None
        self.observe(self.lowest(score, top))

    def end_step(self, mean: Tensor, total: Tensor | None = None, rate: float = 0.0) -> None:
        """Adds a step's mean over all its sequences to the running average."""
        self.average = self.average.to(mean.device) * self.momentum + mean * (1 - self.momentum)
        self.steps += 1

    @property
    def value(self) -> Tensor:
        """tau, a scalar in float32 like the scores; 0 before the first step."""
        return (self.average / (1 - self.momentum**self.steps) if self.steps else self.average).float()

    def state(self) -> dict[str, float]:
        return {"average": float(self.average), "steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.average, self.steps = (
            torch.tensor(state["average"], dtype=torch.float64, device=device),
            int(state["steps"]),
        )


# ---- statistics: accumulated on the device, and read only when requested --------------------------
#
# None depends on how a step is split into micro-batches or over ranks: a statistic is kept as sums or as an extreme,
# which can be combined, and becomes a number only when it is read.


class Statistic(NamedTuple):
    """A statistic of some tokens, in a form that can be combined with that of other tokens."""

    how: str
    """`mean` of [total, count], `std` of [squares, total, count], `min` or `max` of [value]."""
    parts: Tensor
    """[n] in float64."""

    def plus(self, other: "Statistic") -> "Statistic":
        if self.how in ("min", "max"):
            pick = torch.minimum if self.how == "min" else torch.maximum
            return Statistic(self.how, pick(self.parts, other.parts))
        return Statistic(self.how, self.parts + other.parts)

    @property
    def value(self) -> Tensor:
        """The statistic's value, in float32."""
        if self.how in ("min", "max"):
            return self.parts[0].float()
        count = self.parts[-1].clamp(min=1)
        mean = self.parts[-2] / count
        if self.how == "std":
            mean = (self.parts[0] / count - mean.square()).clamp(min=0).sqrt()
        return mean.float()


def mean_where(x: Tensor, mask: Tensor) -> Statistic:
    """Mean of x over the tokens where mask, of the same shape, is true; 0 if there are none."""
    x = x.detach().double() * mask
    return Statistic("mean", torch.stack([x.sum(), mask.sum().double()]))


def deviation_where(x: Tensor, mask: Tensor | None = None) -> Statistic:
    """Standard deviation of x over the tokens where mask, of the same shape, is true (default: all); 0 if there are none."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    x = x.detach().double() * mask
    return Statistic("std", torch.stack([x.square().sum(), x.sum(), mask.sum().double()]))


def least(x: Tensor) -> Statistic:
    return Statistic("min", x.detach().double().min().reshape(1))


def most(x: Tensor) -> Statistic:
    return Statistic("max", x.detach().double().max().reshape(1))


class Monitor:
    """Statistics of the micro-batches since the last reading. Recording never waits for the device."""

    def __init__(self) -> None:
        self._found: dict[str, Statistic] = {}

    def record(self, values: Mapping[str, Tensor | Statistic]) -> None:
        """Records one micro-batch. A scalar tensor is a mean over tokens or sequences, whose number is equal in all
        micro-batches. The names must be the same in every call between two readings."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().double()
                value = Statistic("mean", torch.stack([value, torch.ones_like(value)]))
            self._found[name] = self._found[name].plus(value) if name in self._found else value

    def take(self) -> dict[str, Statistic]:
        """Returns what was recorded since the last reading, and forgets it."""
        found, self._found = self._found, {}
        return found

    def read(self) -> dict[str, Tensor]:
        """The same as numbers; empty if nothing was recorded."""
        return {name: statistic.value for name, statistic in self.take().items()}
