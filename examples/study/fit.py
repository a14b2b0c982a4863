"""What a skipped layer is worth, from losses over parameters and tokens.

    L = exp(e) + exp(a) N^-alpha + exp(b) D^-beta,   N = unskipped parameters + worth(kind) * skipped parameters

The form is that of arXiv 2203.15556 (section 3.3); that of N follows arXiv 2604.21106, which asks the same of layers
that are repeated. N counts the parameters of layers, the skipped ones being those that some tokens pass by; D are
tokens. `worth` is how many dense layers one skipped layer stands for. A skipped layer costs about its capacity of a
dense layer's operations, so skipping pays where `worth` exceeds the capacity. Errors are differences of logarithms,
weighed by Huber's function. Intervals are from 200 samples: each row is the mean of its cell (budget, size, kind) plus a
deviation drawn, with replacement, from those of all cells with several seeds. So cells with one seed have their share of
the deviation, and cells of three do not stand for their own three deviations alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

SAMPLES = 200
INTERVAL = (5, 95)
"""Percentiles."""
STARTS = ((1.0, 3.0, 5.0, 0.35, 0.35), (0.5, 5.0, 7.0, 0.35, 0.5), (1.3, 8.0, 3.0, 0.7, 0.2))
"""e, a, b, alpha and beta; the fit with the smallest error counts, because there are several minima."""
LARGEST_EXPONENT = 1.0
"""Published fits of language models have 0.2 to 0.5. Without a bound, rows whose loss tokens alone decide are fitted by a cliff
in N below the smallest size, and `worth` says where the cliff is."""
LARGEST_ERROR = 1e-2
"""In the logarithm of a loss, above which Huber's function is linear."""
LARGEST_WORTH = 4.0
"""In dense layers, to which the fit is bound: the few rows of a sample may not hold it."""
LEAST_CELLS = 6
Row = dict[str, Any]


def predicted(
    values: np.ndarray, parameters: np.ndarray, tokens: np.ndarray, worth: np.ndarray
) -> np.ndarray:
    """Logarithm of the loss [n]. parameters: [n, 2], unskipped and skipped. tokens, worth: [n]."""
    e, a, b, alpha, beta = values
    size = np.log(np.maximum(parameters[:, 0] + worth * parameters[:, 1], 1.0))
    return np.logaddexp(np.logaddexp(e, a - alpha * size), b - beta * np.log(tokens))


def residuals(rows: Sequence[Row], kinds: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """From the values of a fit to the errors of its logarithms [n]."""
    parameters = np.array([row["parameters"] for row in rows], float)
    tokens = np.array([row["tokens"] for row in rows], float)
    losses = np.log([row["loss"] for row in rows])
    index = np.array([kinds.index(row["kind"]) if row["kind"] in kinds else len(kinds) for row in rows])

    def errors(values: np.ndarray) -> np.ndarray:
        worth = np.append(values[5:], 0.0)[index]
        return predicted(values[:5], parameters, tokens, worth) - losses

    return errors


def fit(rows: Sequence[Row], kinds: Sequence[str]) -> np.ndarray:
    """e, a, b, alpha, beta, and the worth of a skipped layer of each of `kinds`."""
    count = len(STARTS[0]) + len(kinds)
    low, high = np.full(count, -np.inf), np.full(count, np.inf)
    low[3:], high[3:5], high[5:] = 0, LARGEST_EXPONENT, LARGEST_WORTH
    found = [
        least_squares(
            residuals(rows, kinds),
            np.append(start, np.full(len(kinds), 0.5)),
            bounds=(low, high),
            loss="huber",
            f_scale=LARGEST_ERROR,
        )
        for start in STARTS
    ]
    return np.asarray(min(found, key=lambda of: of.cost).x)


def cell_of(row: Row) -> tuple[Any, ...]:
    return row["budget"], row["size"], row["kind"]


def losses_of(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[float]]:
    """Logarithms of the losses of each cell's seeds."""
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        cells.setdefault(cell_of(row), []).append(float(np.log(row["loss"])))
    return cells


def deviations_of(cells: dict[tuple[Any, ...], list[float]]) -> list[float]:
    """From the means of cells with several seeds, as large as those of single runs from the mean of all."""
    return [
        float((loss - np.mean(losses)) * np.sqrt(len(losses) / (len(losses) - 1)))
        for losses in cells.values()
        if len(losses) > 1
        for loss in losses
    ]


def sampled(rows: Sequence[Row], random: np.random.Generator) -> list[Row]:
    """Each row with its cell's mean in place of its loss, and a deviation."""
    cells = losses_of(rows)
    drawn = random.choice(deviations_of(cells), size=len(rows))
    means = {cell: np.mean(losses) for cell, losses in cells.items()}
    return [
        row | {"loss": float(np.exp(means[cell_of(row)] + of))} for row, of in zip(rows, drawn, strict=True)
    ]


def say_errors(
    rows: Sequence[Row], kinds: Sequence[str], found: np.ndarray, deviations: Sequence[float]
) -> str:
    """How far the rows are from the fit, beside how far seeds are from each other; and whether an exponent is at its bound."""
    errors = residuals(rows, kinds)(found)
    said = f"Rows differ from it by {np.sqrt(np.mean(errors**2)):.2%} (root mean square)"
    if deviations:
        said += f"; seeds of one cell differ from their mean by {np.sqrt(np.mean(np.square(deviations))):.2%}"
    bound = [name for name, of in zip(("N", "D"), found[3:5], strict=True) if of > 0.99 * LARGEST_EXPONENT]
    return (
        said
        + "."
        + "".join(
            f" The exponent of {name} is at its bound: these rows hardly tell what {name} is worth."
            for name in bound
        )
    )


def say_fit(rows: Sequence[Row], dense: str) -> str:
    """The fit in Markdown, or why there is none. `dense`: the kind without skipped layers."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["kind"] != dense))
    cells = {(row["budget"], row["size"]) for row in rows if row["kind"] == dense}
    budgets = {budget for budget, _ in cells}
    if not kinds or len(budgets) < 2 or len(cells) < LEAST_CELLS:
        return (
            f"No fit yet: it takes routed runs, and dense ones of {LEAST_CELLS} sizes and budgets, two budgets among them. "
            f"There are {len(cells)} of {len(budgets)}.\n"
        )
    found = fit(rows, kinds)
    deviations = deviations_of(losses_of(rows))
    if deviations:
        random = np.random.default_rng(0)
        samples = np.array([fit(sampled(rows, random), kinds) for _ in range(SAMPLES)])
        low, high = np.percentile(samples, INTERVAL, axis=0)
    e, a, b, alpha, beta = found[:5]
    lines = [
        f"L = {np.exp(e):.3f} + {np.exp(a):.4g} N^-{alpha:.3f} + {np.exp(b):.4g} D^-{beta:.3f}, over {len(rows)} runs. "
        f"{say_errors(rows, kinds, found, deviations)}\n",
        "| kind | a skipped layer is worth, in dense layers | 90 % interval |",
        "| --- | --- | --- |",
        *(
            f"| {kind} | {found[5 + i]:.2f} | "
            + (f"{low[5 + i]:.2f} to {high[5 + i]:.2f} |" if deviations else "needs two seeds |")
            for i, kind in enumerate(kinds)
        ),
    ]
    return "\n".join(lines) + "\n"
