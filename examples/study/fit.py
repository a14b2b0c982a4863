"""What a skipped layer is worth, from losses over parameters and tokens.

    L = exp(e) + exp(a) N^-alpha + exp(b) D^-beta,   N = unskipped parameters + worth(kind) * skipped parameters

The form is that of arXiv 2203.15556 (section 3.3); that of N follows arXiv 2604.21106, which asks the same of layers
that are repeated. N counts the parameters of layers, the skipped ones being those that some tokens pass by; D are
tokens. `worth` is how many dense layers one skipped layer stands for. A skipped layer costs about its capacity of a
dense layer's operations, so skipping pays where `worth` exceeds the capacity. Errors are differences of logarithms,
weighed by Huber's function. Intervals are from 200 samples of the rows. In a sample, the logarithm of a row's loss is the mean of
its cell (budget, size, kind), plus a deviation that all cells of one budget and seed share, plus one of its own; both are
drawn, with replacement, from those of the cells that have several seeds.
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
"""Dense ones, for a fit."""
LEAST_REPEATED = 8
"""Cells with several seeds, for an interval."""
NEAR = 1e-2
"""Relative to a bound, from which on a value counts as being at it."""
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
    errors, count = residuals(rows, kinds), len(STARTS[0]) + len(kinds)
    low, high = np.full(count, -np.inf), np.full(count, np.inf)
    low[3:], high[3:5], high[5:] = 0, LARGEST_EXPONENT, LARGEST_WORTH
    found = [
        least_squares(
            errors,
            np.append(start, np.full(len(kinds), 0.5)),
            bounds=(low, high),
            loss="huber",
            f_scale=LARGEST_ERROR,
        )
        for start in STARTS
    ]
    return np.asarray(min(found, key=lambda of: of.cost).x)


def cells_of(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by budget, size and kind: those of a cell differ in their seeds."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["budget"], row["size"], row["kind"]), []).append(row)
    return cells


def deviations_of(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Of logarithms of losses, from cells with several seeds: what the cells of one budget and seed share, and what is left.
    Both are scaled to be as large as those of single runs from the mean of all."""
    by_seed: dict[tuple[Any, ...], list[float]] = {}
    for of in cells_of(rows).values():
        if len(of) > 1:
            losses = np.log([row["loss"] for row in of])
            scaled = (losses - losses.mean()) * np.sqrt(len(of) / (len(of) - 1))
            for row, deviation in zip(of, scaled, strict=True):
                by_seed.setdefault((row["budget"], row["seed"]), []).append(deviation)
    shared = {key: float(np.mean(found)) for key, found in by_seed.items()}
    return list(shared.values()), [of - shared[key] for key, found in by_seed.items() for of in found]


def sampled(rows: Sequence[Row], random: np.random.Generator) -> list[Row]:
    """Each row, in the order of the cells, with its cell's mean in place of its loss, and the two deviations."""
    shared, own = deviations_of(rows)
    of_seed: dict[tuple[Any, ...], float] = {}
    found = []
    for of in cells_of(rows).values():
        mean = np.mean(np.log([row["loss"] for row in of]))
        for row in of:
            key = (row["budget"], row["seed"])
            if key not in of_seed:
                of_seed[key] = random.choice(shared)
            found.append(row | {"loss": float(np.exp(mean + of_seed[key] + random.choice(own)))})
    return found


def at_bound(values: np.ndarray) -> bool:
    """Whether a bound, and not the rows, decides an exponent or a worth."""
    largest = np.append(np.full(2, LARGEST_EXPONENT), np.full(len(values) - 5, LARGEST_WORTH))
    return bool(np.any((values[3:] > (1 - NEAR) * largest) | (values[3:] < NEAR * largest)))


def say_fit(rows: Sequence[Row], dense: str) -> str:
    """The fit in Markdown, or why there is none. `dense`: the kind without skipped layers."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["kind"] != dense))
    cells = {(row["budget"], row["size"]) for row in rows if row["kind"] == dense}
    budgets = {budget for budget, _ in cells}
    if not kinds or len(budgets) < 2 or len(cells) < LEAST_CELLS:
        return (
            f"No fit yet: it needs routed runs, and dense runs of {LEAST_CELLS} cells (a size in a budget) and two budgets. "
            f"There are {len(cells)} dense cells, of {len(budgets)} budgets.\n"
        )
    found = fit(rows, kinds)
    e, a, b, alpha, beta = found[:5]
    error = np.sqrt(np.mean(residuals(rows, kinds)(found) ** 2))
    said = (
        f"L = {np.exp(e):.3f} + {np.exp(a):.4g} N^-{alpha:.3f} + {np.exp(b):.4g} D^-{beta:.3f}, over {len(rows)} runs. "
        f"Losses differ from it by {error:.2%} (root mean square)"
    )
    intervals = ["needs more seeds"] * len(kinds)
    if sum(len(of) > 1 for of in cells_of(rows).values()) >= LEAST_REPEATED:
        random = np.random.default_rng(0)
        samples = np.array([fit(sampled(rows, random), kinds) for _ in range(SAMPLES)])
        low, high = np.percentile(samples, INTERVAL, axis=0)
        intervals = [f"{low[5 + i]:.2f} to {high[5 + i]:.2f}" for i in range(len(kinds))]
        bound = np.mean([at_bound(sample) for sample in samples])
        spread = np.sqrt(sum(np.mean(np.square(of)) for of in deviations_of(rows)))
        said += (
            f"; the standard deviation over seeds is {spread:.2%}. In {bound:.0%} of the samples an exponent or a worth ends at "
            "a bound"
        )
    if at_bound(found):
        said += ". The fit itself ends at a bound: the rows do not determine all of its values"
    lines = [
        said + ".\n",
        "| kind | a skipped layer is worth, in dense layers | 90 % interval |",
        "| --- | --- | --- |",
        *(
            f"| {kind} | {worth:.2f} | {interval} |"
            for kind, worth, interval in zip(kinds, found[5:], intervals, strict=True)
        ),
    ]
    return "\n".join(lines) + "\n"
