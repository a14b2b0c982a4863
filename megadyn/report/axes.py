"""Axes of charts: where ticks are, how values are formatted, which points a curve needs."""

import math

import numpy as np
from numpy.typing import NDArray

from megadyn.report.run import Values

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LONGEST_CURVE = 400
"""Largest number of points in a drawn curve; more than a chart has pixel columns."""


class Axis:
    """One direction of a chart: maps values from `low` to `high` onto 0 to 1, with ticks at round values.

    A logarithmic axis needs values above 0; other values are left out of the chart.
    """

    def __init__(self, low: float, high: float, *, log: bool = False, count: int = 5):
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9 * max(abs(low), abs(high)) or high == low:  # constant values: widen the range
            room = abs(low) * 0.05 or 1.0
            low, high = low - room, high + room
        self.low, self.high, self.log, self.count = low, high, log, count

    def place(self, values: Values) -> Values:
        """0 to 1; NaN for values that a logarithmic axis cannot show."""
        if self.log:
            values = np.log10(np.where(values > 0, values, np.nan))
        return (values - self.low) / (self.high - self.low)

    def value(self, place: float) -> float:
        """The inverse of `place`."""
        value = self.low + place * (self.high - self.low)
        return 10**value if self.log else value

    def ticks(self) -> list[tuple[float, str]]:
        """Round values inside the axis, and their labels."""
        if self.log and self.high - self.low >= 1:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            chosen = list(powers)[:: math.ceil(len(powers) / (self.count + 1))]
            return [(10.0**power, brief(10.0**power)) for power in chosen]
        low, high = self.value(0), self.value(1)
        step = round_step((high - low) / self.count)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [(k * step, label(k * step, step, max(abs(low), abs(high)))) for k in range(first, last + 1)]


def round_step(wanted: float) -> float:
    """1, 2 or 5 times a power of ten, at least `wanted`."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= wanted * (1 - 1e-9))


def label(value: float, step: float, largest: float) -> str:
    """`value` with as many decimals as `step` needs, in the unit for the axis's `largest` value: `0.75`, `1.2M`, `2e-05`."""
    if value == 0:
        return "0"
    if largest < 1e-3:
        return f"{value:.3g}"
    unit, suffix = next(((unit, suffix) for unit, suffix in UNITS if largest >= max(unit, 1e4)), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return f"{value / unit:,.{decimals}f}{suffix}"


def brief(value: float) -> str:
    """At least three significant digits: `0.497`, `3,457`, `45.7k`, `2e-05`."""
    if abs(value) < 1e4:
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"
    unit, suffix = next((unit, suffix) for unit, suffix in UNITS if abs(value) >= unit)
    return f"{value / unit:.3g}{suffix}" if abs(value) < 999.5e12 else f"{value:.2e}"


def spans_decades(values: Values) -> bool:
    """Whether to use a logarithmic axis: all values above 0, the largest at least 50 times the smallest."""
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() >= 50 * values.min())


def thin(y: Values, most: int = LONGEST_CURVE) -> NDArray[np.int64]:
    """Indices of the points to draw: all of a short curve, otherwise the lowest and the highest of each of `most` / 2
    stretches, so that no spike is lost. A stretch without finite values keeps one point, which leaves a gap."""
    if len(y) <= most:
        return np.arange(len(y))
    kept: set[int] = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), most // 2):
        inside = y[stretch]
        if np.isfinite(inside).any():
            kept |= {int(stretch[np.nanargmin(inside)]), int(stretch[np.nanargmax(inside)])}
        else:
            kept.add(int(stretch[0]))
    return np.array(sorted(kept))


def bin_means(x: Values, z: Values, most: int) -> tuple[Values, Values]:
    """x [N] and z [rows, N] averaged over at most `most` stretches of N; NaN for stretches without finite values."""
    stretches = np.array_split(np.arange(len(x)), min(most, len(x)))
    counts = [np.isfinite(z[:, part]).sum(axis=1) for part in stretches]
    sums = [np.nansum(z[:, part], axis=1) for part in stretches]
    with np.errstate(invalid="ignore"):
        means = np.stack([total / count for total, count in zip(sums, counts, strict=True)], axis=1)
    return np.array([x[part].mean() for part in stretches]), means
