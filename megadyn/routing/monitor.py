"""Statistics of one routed layer, summed on the device and read only when asked for.

None depends on how a step is split into micro-batches or over ranks: a statistic is kept as sums, or as an extreme, that add up,
and becomes a number when it is read.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


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
