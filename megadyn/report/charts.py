"""Charts as HTML figures with inline SVG. Colours are classes of page.css, so that the same page works in light and dark mode.

Each chart is drawn for about the width of a phone and scales with its column. The values that page.js shows under the
pointer are in the figure's `data-hover`.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from megadyn.report.axes import Axis, bin_means, brief, spans_decades, thin
from megadyn.report.run import Values

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 32
LEVELS = 9
"""Shades of a heat map; page.css has equally many."""
COLOURS = 6
"""Colours of curves; page.css has equally many."""
HEAT_COLUMNS = 90
FEW_POINTS = 12
"""Curves with at most this many points also mark each point."""


class Curve(NamedTuple):
    name: str
    x: Values
    y: Values
    colour: int = 0
    style: str = ""
    """`dashed`, `dotted` or `mixed`, so that curves differ not only in colour; default: solid."""
    spread: Values | None = None
    """Half the height of a band around y."""


class Mark(NamedTuple):
    """A vertical line with a name at its top."""

    x: float
    name: str


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_name: str,
    from_zero: bool = False,
    y_range: tuple[float, float] | None = None,
    named: bool = True,
    marks: Sequence[Mark] = (),
) -> str:
    """One or more curves over a common axis, with a legend if `named`; logarithmic if the values span decades. `marks` are
    vertical lines at places of the axis. Empty string if there are no finite values."""
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not curves:
        return ""
    every = np.concatenate([curve.y for curve in curves])
    low, high = y_range or (float(np.nanmin(every)), float(np.nanmax(every)))
    log = not from_zero and y_range is None and spans_decades(every)
    if not log and y_range is None:
        low, high = (0.0 if from_zero else low - 0.04 * (high - low)), high + 0.04 * (high - low)
    y_axis = Axis(low, high, log=log)
    x_axis = Axis(
        min(0.0, *(float(curve.x.min()) for curve in curves)), max(float(curve.x.max()) for curve in curves)
    )
    parts = [
        grid(x_axis, y_axis, x_name),
        *(draw_mark(mark, x_axis) for mark in marks if x_axis.low < mark.x < x_axis.high),
        *(draw(curve, x_axis, y_axis) for curve in curves),
    ]
    hover = {
        "kind": "lines",
        "name": x_name,
        "x": [x_axis.low, x_axis.high],
        "curves": [
            {"name": curve.name, "x": rounded(curve.x[kept]), "y": rounded(curve.y[kept])}
            for curve in curves
            for kept in [thin(curve.y)]
        ],
    }
    keys = legend(curves) if named else ""
    return figure(title + (" (logarithmic)" if log else ""), keys, svg(parts, HEIGHT), hover)


def grid(x_axis: Axis, y_axis: Axis, x_name: str) -> str:
    parts = []
    for value, text in y_axis.ticks():
        y = TOP + (1 - place(y_axis, value)) * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
        )
    parts.append(x_ticks(x_axis, HEIGHT - BOTTOM, x_name))
    return "".join(parts)


def x_ticks(axis: Axis, bottom: float, name: str, right: float = RIGHT) -> str:
    """The horizontal axis of a chart whose plot ends at `bottom`: line, ticks and name."""
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - right}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>']
    for value, text in axis.ticks():
        x = LEFT + place(axis, value) * (WIDTH - LEFT - right)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 3:.1f}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{text}</text>'
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - right}" y="{bottom + 27:.1f}" text-anchor="end">{escape(name)}</text>'
    )
    return "".join(parts)


def place(axis: Axis, value: float) -> float:
    return float(axis.place(np.array([value]))[0])


def draw(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    kept = thin(curve.y)
    x = LEFT + x_axis.place(curve.x[kept]) * (WIDTH - LEFT - RIGHT)

    def heights(values: Values) -> Values:
        return TOP + (1 - y_axis.place(values).clip(0, 1)) * (HEIGHT - TOP - BOTTOM)

    y, parts = heights(curve.y[kept]), []
    if curve.spread is not None:
        upper, lower = heights((curve.y + curve.spread)[kept]), heights((curve.y - curve.spread)[kept])
        sound = np.isfinite(upper) & np.isfinite(lower)
        outline = [*zip(x[sound], upper[sound]), *zip(x[sound][::-1], lower[sound][::-1])]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in outline)
        parts.append(f'<polygon class="band c{curve.colour}" points="{points}"/>')
    parts.append(f'<path class="line c{curve.colour} {curve.style}" d="{path(x, y)}"/>')
    if len(kept) <= FEW_POINTS:
        parts += [
            f'<circle class="dot c{curve.colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>'
            for a, b in zip(x, y)
            if np.isfinite(b)
        ]
    return "".join(parts)


def draw_mark(mark: Mark, x_axis: Axis) -> str:
    x = LEFT + place(x_axis, mark.x) * (WIDTH - LEFT - RIGHT)
    # A name that would leave the chart stands on the other side of its line.
    side, anchor = (-3, "end") if x > WIDTH / 2 else (3, "start")
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{x + side:.1f}" y="{TOP + 9}" text-anchor="{anchor}">{escape(mark.name)}</text>'
    )


def path(x: Values, y: Values) -> str:
    """Commands of an SVG path, interrupted where y is NaN; a single point becomes a dot."""
    words, pen_down = [], False
    for a, b in zip(x, y):
        if np.isfinite(b):
            words.append(f"L{a:.1f} {b:.1f}" if pen_down else f"M{a:.1f} {b:.1f}h0")
        pen_down = bool(np.isfinite(b))
    return "".join(words)


def legend(curves: Sequence[Curve]) -> str:
    keys = (
        f'<span class="key"><svg viewBox="0 0 30 8" aria-hidden="true"><path class="line c{curve.colour} {curve.style}" '
        f'd="M1 4H29"/></svg>{escape(curve.name)}</span>'
        for curve in curves
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def heat_map(
    title: str,
    layers: Sequence[int],
    x: Values,
    z: Values,
    *,
    x_name: str,
    low: float,
    high: float,
    log: bool = False,
) -> str:
    """z [layers, N] over x [N], one row per layer, shaded from `low` to `high`; each row's last value is printed after
    it. If there are many records, a column is the mean of a stretch."""
    if not np.isfinite(z).any():
        return ""
    columns, means = bin_means(x, z, HEAT_COLUMNS)
    row = 15 if len(layers) <= 12 else 10
    right, bottom = 44, TOP + row * len(layers)
    borders = edges(columns)
    axis, shades = Axis(float(borders[0]), float(borders[-1])), Axis(low, high, log=log)
    across = LEFT + axis.place(borders) * (WIDTH - LEFT - right)
    level = (shades.place(means) * LEVELS).clip(0, LEVELS - 1)
    parts = []
    for shade in range(LEVELS):
        cells = "".join(
            f"M{across[first]:.1f} {TOP + i * row}H{across[end]:.1f}v{row - 1}H{across[first]:.1f}z"
            for i in range(len(layers))
            for first, end in runs(np.floor(level[i]) == shade)
        )
        if cells:
            parts.append(f'<path class="h{shade}" d="{cells}"/>')
    for i, layer in enumerate(layers):
        y = TOP + (i + 0.5) * row + 3
        known = z[i][np.isfinite(z[i])]
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{y:.1f}" text-anchor="end">{layer}</text>'
            f'<text class="tick" x="{WIDTH - right + 4}" y="{y:.1f}">{brief(known[-1]) if known.size else ""}</text>'
        )
    parts.append(x_ticks(axis, bottom, x_name, right))
    parts.append(
        f'<text class="tick" x="{LEFT - 5}" y="{bottom + 27}" text-anchor="end">layer</text>'
        f'<text class="tick" x="{WIDTH - right + 4}" y="{bottom + 27}">last</text>'
    )
    hover = {
        "kind": "heat",
        "name": x_name,
        "x": [axis.low, axis.high],
        "columns": rounded(columns),
        "rows": list(layers),
        "right": right,
        "row": row,
        "z": [rounded(values) for values in means],
    }
    scale = "".join(f'<rect class="h{k}" x="{k * 10}" width="10" height="8"/>' for k in range(LEVELS))
    keys = (
        f'<div class="legend"><span>{brief(low)}</span><svg class="scale" viewBox="0 0 {LEVELS * 10} 8" aria-hidden="true">'
        f"{scale}</svg><span>{brief(high)}{' (logarithmic)' if log else ''}</span></div>"
    )
    return figure(title, keys, svg(parts, bottom + BOTTOM), hover)


def edges(centres: Values) -> Values:
    """Borders [N + 1] half-way between ascending centres [N]."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def runs(mask: np.ndarray[Any, Any]) -> Iterable[tuple[int, int]]:
    """(first, end) of each run of true values."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return zip(borders[::2].tolist(), borders[1::2].tolist())


def rounded(values: Values) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


def svg(parts: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{height - BOTTOM}" visibility="hidden"/></svg>'
    )


def figure(title: str, keys: str, picture: str, hover: dict[str, Any]) -> str:
    hover |= {"left": LEFT, "width": WIDTH, "top": TOP} | ({} if "right" in hover else {"right": RIGHT})
    data = escape(json.dumps(hover, separators=(",", ":"), allow_nan=False))
    return (
        f'<figure class="chart" data-hover="{data}"><figcaption>{escape(title)}</figcaption>{keys}{picture}'
        f"<output>&nbsp;</output></figure>"
    )
