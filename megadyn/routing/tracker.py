"""What a layer gathers over micro-batches: averages that it carries from step to step, and statistics for reports."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megadyn.routing.select import Selection, take


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


class RunningThreshold(StepTracker):
    """tau: route iff score >= tau, a causal stand-in for top-k, which looks at the future and so cannot generate. A
    bias-corrected running average, over training steps, of the mean k-th highest score.

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


# ---- statistics: summed on the device, and read only when asked for ------------------------------
#
# None depends on how a step is split into micro-batches or over ranks: a statistic is kept as sums, or as an extreme, that add
# up, and becomes a number when it is read.


class Statistic(NamedTuple):
    """One statistic of some tokens, so that those of two sets of tokens make that of both."""

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
        """The number itself, in float32."""
        if self.how in ("min", "max"):
            return self.parts[0].float()
        count = self.parts[-1].clamp(min=1)
        mean = self.parts[-2] / count
        if self.how == "std":
            mean = (self.parts[0] / count - mean.square()).clamp(min=0).sqrt()
        return mean.float()


def mean_where(x: Tensor, mask: Tensor) -> Statistic:
    """Mean of x over the tokens where mask, of its shape, is true; 0 without any."""
    x = x.detach().double() * mask
    return Statistic("mean", torch.stack([x.sum(), mask.sum().double()]))


def deviation_where(x: Tensor, mask: Tensor | None = None) -> Statistic:
    """Standard deviation of x over the tokens where mask, of its shape, is true (default: all); 0 without any."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    x = x.detach().double() * mask
    return Statistic("std", torch.stack([x.square().sum(), x.sum(), mask.sum().double()]))


def least(x: Tensor) -> Statistic:
    return Statistic("min", x.detach().double().min().reshape(1))


def most(x: Tensor) -> Statistic:
    return Statistic("max", x.detach().double().max().reshape(1))


class Monitor:
    """The statistics of the micro-batches since the last reading. Recording never waits for the device."""

    def __init__(self) -> None:
        self._found: dict[str, Statistic] = {}

    def record(self, values: Mapping[str, Tensor | Statistic]) -> None:
        """One micro-batch's; a scalar tensor is a mean over tokens or sequences, of which each micro-batch has as many. The
        names must be the same in every call of a window."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().double()
                value = Statistic("mean", torch.stack([value, torch.ones_like(value)]))
            self._found[name] = self._found[name].plus(value) if name in self._found else value

    def take(self) -> dict[str, Statistic]:
        """What was recorded since the last reading; forgets it."""
        found, self._found = self._found, {}
        return found

    def read(self) -> dict[str, Tensor]:
        """The same as numbers; empty when nothing was recorded."""
        return {name: statistic.value for name, statistic in self.take().items()}
