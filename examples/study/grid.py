"""Models of several sizes and kinds on one text at equal operations: a row per run, and what a skipped layer is worth.

    python examples/study/grid.py --output runs/grid [--most N] [--jobs 2] [--minutes M] [--device cpu] [key=value ...]
    python examples/study/grid.py --output runs/grid --results examples/study/grid.jsonl --fit

Makes corpus, tokenizer and datasets if they are not there. Then takes the runs that have no row in `results.jsonl`
yet. For each budget, smallest first, it tries the rates on a dense and on a routed model of one size; then it takes
every size and kind with the best rate, seed by seed. What is there is usable at any time: you can stop the command and
start it again. `--fit` runs nothing and prints tables and the fit of the rows that are there. Overrides are part of a
row: tables and fit are of the rows with the same ones.
"""

import argparse
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megadyn.arguments import positive
from megadyn.benchmark.experiments import (
    Row,
    add_options,
    add_row,
    check_again,
    folder_name,
    markdown,
    mean_and_spread,
    read_rows,
    records_of,
    shares_of,
    start,
    train,
)
from megadyn.config import Config, load_config
from megadyn.errors import Parser, UserError, run_tool
from megadyn.kinds import DENSE
from megadyn.planning.flops import training_flops
from megadyn.planning.parameters import layer_parameters

HERE = Path(__file__).parent
BUDGETS = (1e13, 3e13, 1e14)
"""Operations of a run, forward and backward."""
SIZES = {"64x4": 64, "96x6": 96, "128x8": 128, "160x10": 160}
"""Name, width by layers, and width; heads are of 32, a feed-forward is three times as wide."""
SEEDS = (1, 2, 3)
KINDS: dict[str, list[str]] = {
    "dense": [],
    "mod": ["model.routing.kind=mod", "model.routing.capacity=0.25", "model.routing.threshold_momentum=0.9"],
    "dtf": ["model.routing.kind=dtf", "model.routing.capacity=0.25", "model.routing.threshold_momentum=0.9"],
    "random": ["model.routing.kind=fixed", "model.routing.capacity=0.25", "model.routing.score=random"],
}
"""Every second layer processes a quarter of the tokens; `random` is the control that learns no choice."""
SWEPT, SWEPT_KINDS = "96x6", ("dense", "mod")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SWEEP_SEED = 0
VOCABULARY = 8192
WARMUP = 0.1
"""Share of the steps."""
ROW = ("kind", "size", "budget", "seed", "rate", "overrides", "loss")


class Cell(NamedTuple):
    """What a run is, and so the key of its row."""

    budget: float
    seed: int
    size: str
    kind: str
    rate: float
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.size}, {self.budget:g} operations, rate {self.rate:g}, seed {self.seed}"


def cell_of(row: Row) -> Cell:
    return Cell(row["budget"], row["seed"], row["size"], row["kind"], row["rate"], tuple(row["overrides"]))


# ---- runs ------------------------------------------------------------------------------------------------------------


def make_data(output: Path) -> None:
    """Corpus, tokenizer and datasets under `output`, unless they are there."""
    corpus, tokenizer = output / "corpus", output / "tokenizer"
    if not (corpus / "train.jsonl").exists():
        start([str(HERE / "make_corpus.py"), str(corpus)])
    if not tokenizer.exists():
        words = ["--input", str(corpus / "train.jsonl"), "--vocab-size", str(VOCABULARY)]
        start(["-m", "megadyn", "tokenizer", *words, "--output", str(tokenizer)])
    for part in ("train", "validation"):
        prefix = output / "data" / part
        if not prefix.with_suffix(".idx").exists():
            words = ["--input", f"{corpus / part}.jsonl", "--tokenizer", str(tokenizer)]
            start(["-m", "megadyn", "preprocess", *words, "--output-prefix", str(prefix), "--append-eod"])


def command(cell: Cell, output: Path, *, again: bool = False) -> list[str]:
    """Configuration and overrides; `again`: from the start, in a folder of its own."""
    width = SIZES[cell.size]
    name = f"{cell.budget:g}-{cell.size}-{cell.kind}-{cell.rate:g}-seed{cell.seed}"
    name = folder_name(name, cell.overrides)
    words = [
        f"output_dir={output / ('again' if again else 'runs') / name}",
        *(["checkpoint.resume=never"] if again else []),
        f"tokenizer.path={output / 'tokenizer'}",
        f"data.train={output / 'data/train'}",
        f"data.validation={output / 'data/validation'}",
        f"model.hidden_size={width}",
        f"model.num_layers={cell.size.partition('x')[2]}",
        f"model.num_heads={width // 32}",
        f"model.ffn_size={3 * width}",
        *KINDS[cell.kind],
        f"training.flops={cell.budget}",
        f"training.seed={cell.seed}",
        f"optimizer.learning_rate={cell.rate}",
        *cell.overrides,
    ]
    config = settled(words)
    warmup = max(1, round(WARMUP * (config.training.iterations or 0)))
    return [str(HERE / "grid.yaml"), *words, f"optimizer.warmup_iterations={warmup}"]


def settled(words: Sequence[str]) -> Config:
    """The configuration with the number of steps that its operations allow."""
    config = load_config(HERE / "grid.yaml", [*words, "optimizer.warmup_iterations=0"])
    config.model.vocab_size = VOCABULARY
    length = config.training.sequence_length
    config.training.settle(sample_flops=training_flops(config.model, length))
    return config


def run(cell: Cell, output: Path, *, again: bool = False) -> Row:
    """Trains one model; the row of its last validation."""
    words = command(cell, output, again=again)
    config = settled(words[1:])
    if again:
        shutil.rmtree(config.output_dir, ignore_errors=True)
    train(words)
    model, length = config.model, config.training.sequence_length
    steps, last = records_of(Path(config.output_dir))
    parameters = layer_parameters(model)
    skipped = [index for index, of in enumerate(model.layer_types) if index in shares_of(steps[-1])]
    return {
        **cell._asdict(),
        "overrides": list(cell.overrides),
        "steps": config.training.iterations,
        "tokens": steps[-1]["consumed_tokens"],
        "parameters": [
            sum(of for index, of in enumerate(parameters) if index not in skipped),
            sum(parameters[index] for index in skipped),
        ],
        "flops_per_token": training_flops(model, length) / length,
        "flops": training_flops(model, length) / length * steps[-1]["consumed_tokens"],
        "seconds": round(
            statistics.mean(step["step_time_ms"] for step in steps) * steps[-1]["iteration"] / 1e3, 1
        ),
        "loss": last["validation"]["causal"],
        "topk": last["validation"]["topk"],
    }


# ---- which runs, in which order --------------------------------------------------------------------------------------


def best_rate(rows: Sequence[Row], budget: float, overrides: tuple[str, ...]) -> float | None:
    """The rate at which the swept kinds have the lowest mean loss; None if a run of the sweep is missing."""
    losses = {cell_of(row): row["loss"] for row in rows}
    means = {}
    for rate in RATES:
        cells = [Cell(budget, SWEEP_SEED, SWEPT, kind, rate, overrides) for kind in SWEPT_KINDS]
        if not all(cell in losses for cell in cells):
            return None
        means[rate] = statistics.mean(losses[cell] for cell in cells)
    return min(means, key=lambda rate: means[rate])


def next_cells(rows: Sequence[Row], overrides: tuple[str, ...]) -> list[Cell]:
    """Runs without a row that can be taken now, in order: the rest of a budget's sweep, else the rest of its grid, then of the
    next budget."""
    there = {cell_of(row) for row in rows}
    for budget in BUDGETS:
        rate = best_rate(rows, budget, overrides)
        if rate is None:
            wanted = [
                Cell(budget, SWEEP_SEED, SWEPT, kind, of, overrides) for of in RATES for kind in SWEPT_KINDS
            ]
        else:
            wanted = [
                Cell(budget, seed, size, kind, rate, overrides)
                for seed in SEEDS
                for size in SIZES
                for kind in KINDS
            ]
        if todo := [cell for cell in wanted if cell not in there]:
            return todo
    return []


def take_runs(args: argparse.Namespace, results: Path) -> None:
    """Runs until nothing is left, `--most` are made, or `--minutes` are over; a run that has begun is ended."""
    end = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    made, overrides = 0, tuple(args.overrides)

    def one(cell: Cell) -> None:
        if time.monotonic() < end:
            row = run(cell, args.output)
            add_row(results, row)
            print(f"{cell}: loss {row['loss']:.4f} after {row['seconds']:.0f} s", flush=True)

    while todo := next_cells(read_rows(results, ROW), overrides)[: args.jobs]:
        if args.most is not None:
            todo = todo[: args.most - made]
        if not todo or time.monotonic() >= end:
            return
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, todo))
        made += len(todo)


# ---- tables ----------------------------------------------------------------------------------------------------------


def grid_rows(rows: Sequence[Row]) -> list[Row]:
    """Those that are not of a sweep."""
    return [row for row in rows if row["seed"] != SWEEP_SEED]


def loss_table(rows: Sequence[Row]) -> str:
    """A line per budget and kind: mean loss over seeds by size, and where a parabola through them is lowest."""
    lines = []
    for budget in sorted({row["budget"] for row in rows}):
        for kind in KINDS:
            runs = [row for row in rows if (row["budget"], row["kind"]) == (budget, kind)]
            if not runs:
                continue
            cells = {size: [row["loss"] for row in runs if row["size"] == size] for size in SIZES}
            seconds = statistics.mean(row["seconds"] for row in runs)
            lines.append(
                [
                    f"{budget:g}",
                    kind,
                    *(mean_and_spread(of, 4) if of else "-" for of in cells.values()),
                    say_optimum(runs),
                    f"{seconds:.0f}",
                ]
            )
    return markdown(["operations", "kind", *SIZES, "best parameters of layers", "seconds"], lines)


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


def sweep_table(rows: Sequence[Row]) -> str:
    """Losses of the rates that were tried."""
    lines = [
        [f"{row['budget']:g}", row["kind"], f"{row['rate']:g}", f"{row['loss']:.4f}"]
        for row in rows
        if row["seed"] == SWEEP_SEED
    ]
    return markdown(["operations", "kind", "rate", "loss"], lines)


def report(rows: Sequence[Row]) -> str:
    """All that the rows say, in Markdown."""
    from fit import say_fit  # beside this file

    return "\n".join([sweep_table(rows), loss_table(grid_rows(rows)), say_fit(grid_rows(rows), DENSE)])


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--most", type=positive, metavar="N", help="stop after N runs")
    parser.add_argument("--minutes", type=positive, metavar="M", help="begin no run after this time")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fit", action="store_true", help="print tables and the fit, run nothing")
    parser.add_argument(
        "--again", type=positive, metavar="LINE", help="make this row of the results again, and compare"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    results = args.results or args.output / "results.jsonl"
    rows = read_rows(results, ROW)
    os.environ["DS_ACCELERATOR"] = args.device
    if args.again is not None and args.again > len(rows):
        raise UserError(f"--again {args.again}: {results} has {len(rows)} rows")
    if not args.fit:
        make_data(args.output)
    if args.again is not None:
        cell = cell_of(rows[args.again - 1])
        row = run(cell, args.output, again=True)
        check_again(str(cell), row["loss"], rows[args.again - 1]["loss"])
        print(f"{cell}: the same loss")
        return 0
    if not args.fit:
        take_runs(args, results)
    rows = [row for row in read_rows(results, ROW) if row["overrides"] == args.overrides]
    if rows:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.md").write_text(report(rows))
        print(report(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
