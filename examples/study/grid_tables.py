"""Tables and figure of the grid's rows; `grid.py` makes the rows."""

import math
import statistics
from collections.abc import Collection, Sequence
from itertools import cycle
from pathlib import Path

from megadyn.benchmark.experiments import Row, markdown, mean_and_spread, pyplot
from megadyn.kinds import DENSE

SWEEP_SEED = 0
"""Of runs that only try rates."""


def grid_rows(rows: Sequence[Row]) -> list[Row]:
    """Those that are not of a sweep."""
    return [row for row in rows if row["seed"] != SWEEP_SEED]


def in_order(rows: Sequence[Row], name: str) -> list:
    """The values of a key, in the order of their first rows."""
    return list(dict.fromkeys(row[name] for row in rows))


def say_loss(row: Row) -> str:
    return "diverged" if row["loss"] is None else f"{row['loss']:.4f}"


def say_row(row: Row) -> str:
    return say_loss(row) if row["loss"] is None else f"loss {say_loss(row)} after {row['seconds']:.0f} s"


def mean_loss(rows: Sequence[Row]) -> float:
    return statistics.mean(row["loss"] for row in rows)


# ---- tables ----------------------------------------------------------------------------------------------------------


def parts_of_report(rows: Sequence[Row], decoded: Sequence[Row]) -> list[str]:
    """All that the rows say, in Markdown. Sizes and kinds stand in the order of the rows."""
    from fit import say_fit  # beside this file; needs scipy

    runs = grid_rows(rows)
    parts = [sweep_table(rows), loss_table(runs), say_fit(runs, DENSE)]
    return [*parts, decode_table(decoded)] if decoded else parts


def sweep_table(rows: Sequence[Row]) -> str:
    """Losses of the rates that were tried."""
    swept = [row for row in rows if row["seed"] == SWEEP_SEED]
    rates = sorted(in_order(swept, "rate"))
    lines = []
    for budget in in_order(swept, "budget"):
        for kind in in_order(swept, "kind"):
            losses = {
                row["rate"]: say_loss(row) for row in swept if (row["budget"], row["kind"]) == (budget, kind)
            }
            if losses:
                lines.append([f"{budget:g}", kind, *(losses.get(rate, "-") for rate in rates)])
    return markdown(["operations", "kind", *(f"rate {rate:g}" for rate in rates)], lines)


def loss_table(rows: Sequence[Row]) -> str:
    """A line per budget and kind: mean loss over seeds by size, where a parabola through them is lowest, and the seconds of
    a run, over sizes."""
    sizes = in_order(rows, "size")
    lines = []
    for budget in in_order(rows, "budget"):
        for kind in in_order(rows, "kind"):
            runs = [row for row in rows if (row["budget"], row["kind"]) == (budget, kind)]
            if not runs:
                continue
            cells = {size: [row["loss"] for row in runs if row["size"] == size] for size in sizes}
            seconds = [
                statistics.mean(row["seconds"] for row in runs if row["size"] == of)
                for of in cells
                if cells[of]
            ]
            lines.append(
                [
                    f"{budget:g}",
                    kind,
                    *(mean_and_spread(of) if of else "-" for of in cells.values()),
                    say_optimum(runs),
                    f"{statistics.mean(seconds):.0f}",
                ]
            )
    return markdown(["operations", "kind", *sizes, "best parameters of layers", "seconds"], lines)


def say_optimum(runs: Sequence[Row]) -> str:
    """From a parabola in the logarithm of the layers' parameters."""
    import numpy as np

    sizes = np.log([sum(row["parameters"]) for row in runs])
    if len(set(sizes)) < 3:
        return "-"
    square, slope, at_0 = np.polyfit(sizes, [row["loss"] for row in runs], 2)
    best = -slope / (2 * square)
    if square <= 0 or not sizes.min() < best < sizes.max():
        return "at an end"
    return f"{math.exp(best):.3g}, loss {at_0 + slope * best + square * best**2:.4f}"


def at_optimum(rows: Sequence[Row], sizes: Collection[str], kinds: Collection[str]) -> list[Row]:
    """A row of each kind, at its size of lowest mean loss, of the largest budget in which a seed has all sizes and kinds.
    Means are over such seeds. Empty without one."""
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        runs.setdefault((row["budget"], row["seed"]), []).append(row)
    whole = {key: of for key, of in runs.items() if len(of) == len(sizes) * len(kinds)}
    if not whole:
        return []
    largest = max(budget for budget, _ in whole)
    compared = [row for (budget, _), of in whole.items() if budget == largest for row in of]
    cells = {
        (kind, size): [row for row in compared if (row["kind"], row["size"]) == (kind, size)]
        for kind in kinds
        for size in sizes
    }
    return [min((cells[kind, size] for size in sizes), key=mean_loss)[0] for kind in kinds]


def decode_table(decoded: Sequence[Row]) -> str:
    """Speed and cache of each kind at its size of lowest loss."""
    lines = [
        [
            row["kind"],
            row["size"],
            f"{row['budget']:g}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['kv_bytes']:.0f}",
        ]
        for row in decoded
    ]
    return markdown(
        [
            "kind",
            "best size",
            "operations",
            "decoded random tokens per CPU second",
            "their KV, bytes per token",
        ],
        lines,
    )


# ---- figure ----------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path) -> None:
    """Mean loss over the layers' parameters, a line per kind and budget; and over seconds of training, a point per size."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    kinds, budgets = in_order(rows, "kind"), sorted(in_order(rows, "budget"))
    for number, kind in enumerate(kinds):
        for budget, style in zip(budgets, cycle(("-", "--", ":", "-.")), strict=False):
            cells = [
                cell
                for size in in_order(rows, "size")
                if (
                    cell := [
                        row
                        for row in rows
                        if (row["kind"], row["budget"], row["size"]) == (kind, budget, size)
                    ]
                )
            ]
            losses = [mean_loss(cell) for cell in cells]
            look = {"color": f"C{number}", "marker": "o", "label": f"{kind}, {budget:g} operations"}
            left.plot([sum(cell[0]["parameters"]) for cell in cells], losses, style, **look)
            seconds = [statistics.mean(row["seconds"] for row in cell) for cell in cells]
            right.plot(seconds, losses, style, **look)
    left.set(xscale="log", xlabel="parameters of layers", ylabel="validation loss, causal routing")
    right.set(xlabel="seconds of training, one thread")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
