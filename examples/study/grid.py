"""Models of several sizes and kinds on one text at equal operations: a row per run, and what a skipped layer is worth.

    python examples/study/grid.py --output runs/grid [--most N] [--jobs 2] [--minutes M] [--device cpu] [key=value ...]
    python examples/study/grid.py --output runs/grid --results examples/study/grid.jsonl --fit
    python examples/study/grid.py --output runs/grid --decode

Makes corpus, tokenizer and datasets if they are not there. Then takes the runs that have no row in `results.jsonl`
yet. For each budget, smallest first, it tries the rates on a dense and on a routed model of one size; then it takes
every size and kind with the best rate, seed by seed. What is there is usable at any time: you can stop the command and
start it again. `--fit` runs nothing: it prints tables and the fit of the rows that are there, and draws them beside the
rows. `--decode` measures how fast each kind decodes random tokens at its best size, from the runs in OUTPUT. Overrides are
part of a row: tables, fit and figure are of the rows with the same ones.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from grid_tables import SWEEP_SEED, at_optimum, draw, grid_rows, parts_of_report, say_row  # beside this file

from megadyn.arguments import positive
from megadyn.benchmark import generate
from megadyn.benchmark.experiments import (
    Row,
    add_options,
    add_row,
    check_again,
    check_text,
    end_runs_on_signals,
    folder_name,
    has_diverged,
    read_rows,
    records_of,
    run_python,
    seconds_of,
    shares_of,
    text_of,
    train,
)
from megadyn.commands import export
from megadyn.config import Config, load_config
from megadyn.errors import Parser, UserError, run_tool
from megadyn.planning.flops import training_flops
from megadyn.planning.parameters import layer_parameters

HERE = Path(__file__).parent
BUDGETS = (3e12, 6e12, 1.2e13, 2.4e13)
"""Operations of a run, forward and backward."""
SIZES = {"32x4": 32, "64x4": 64, "64x8": 64, "96x8": 96}
"""Name, width by layers, and width; heads are of 32, a feed-forward is three times as wide."""
SEEDS = (1, 2, 3)
KINDS: dict[str, list[str]] = {
    "dense": [],
    "mod": ["model.routing.kind=mod", "model.routing.capacity=0.25", "model.routing.threshold_momentum=0.9"],
    "dtf": ["model.routing.kind=dtf", "model.routing.capacity=0.25", "model.routing.threshold_momentum=0.9"],
    "random": ["model.routing.kind=fixed", "model.routing.capacity=0.25", "model.routing.score=random"],
}
"""Every second layer processes a quarter of the tokens; `random` is the control that learns no choice."""
SWEPT, SWEPT_KINDS = "64x4", ("dense", "mod")
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
VOCABULARY = 8192
WARMUP = 0.1
"""Share of the steps."""
DECODED = (
    "--batch",
    "1",
    "--context",
    "192",
    "--steps",
    "64",
    "--rounds",
    "5",
    "--device",
    "cpu",
    "--cpu-time",
)
"""Within the length of training."""
DECODED_ROW = ("kind", "size", "budget", "overrides", "tokens_per_second", "kv_bytes")
CELL = ("kind", "size", "budget", "seed", "rate", "overrides")
MEASURED = ("loss", "topk", "parameters", "tokens", "steps", "seconds")
ROW = (*CELL, "text", *(name for name in MEASURED if name != "topk"))


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
    """Raises UserError for a row of another grid."""
    for name, known in (("size", SIZES), ("kind", KINDS)):
        if row[name] not in known:
            raise UserError(f"a row has {name} {row[name]!r}, but the grid has {', '.join(known)}; remove it")
    return Cell(row["budget"], row["seed"], row["size"], row["kind"], row["rate"], tuple(row["overrides"]))


# ---- runs ------------------------------------------------------------------------------------------------------------


def make_data(output: Path) -> None:
    """Corpus, tokenizer and datasets under `output`, unless they are there."""
    corpus, tokenizer = output / "corpus", output / "tokenizer"
    if not (corpus / "train.jsonl").exists():
        run_python([str(HERE / "make_corpus.py"), str(corpus)])
    if not tokenizer.exists():
        words = ["--input", str(corpus / "train.jsonl"), "--vocab-size", str(VOCABULARY)]
        run_python(["-m", "megadyn", "tokenizer", *words, "--output", str(tokenizer)])
    for part in ("train", "validation"):
        prefix = output / "data" / part
        if not prefix.with_suffix(".idx").exists():
            words = ["--input", f"{corpus / part}.jsonl", "--tokenizer", str(tokenizer)]
            run_python(
                ["-m", "megadyn", "preprocess", *words, "--output-prefix", str(prefix), "--append-eod"]
            )


def data_of(output: Path) -> list[str]:
    """Overrides that name what `make_data` makes."""
    data = output / "data"
    return [
        f"tokenizer.path={output / 'tokenizer'}",
        f"data.train={data / 'train'}",
        f"data.validation={data / 'validation'}",
    ]


def text_here(output: Path) -> str:
    return text_of(load_config(HERE / "grid.yaml", data_of(output)).data)


def command(cell: Cell, output: Path, *, again: bool = False) -> list[str]:
    """Configuration and overrides; `again`: from the start, in a folder of its own."""
    width = SIZES[cell.size]
    name = f"{cell.budget:g}-{cell.size}-{cell.kind}-{cell.rate:g}-seed{cell.seed}"
    name = folder_name(name, cell.overrides)
    words = [
        f"output_dir={output / ('again' if again else 'runs') / name}",
        *(["checkpoint.resume=never"] if again else []),
        *data_of(output),
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
    """Trains one model; the row of its last validation. A run of a sweep may diverge; all that is measured is None then."""
    words = command(cell, output, again=again)
    config = settled(words[1:])
    if again:
        shutil.rmtree(config.output_dir, ignore_errors=True)
    folder = Path(config.output_dir)
    known = cell._asdict() | {"overrides": list(cell.overrides), "text": text_of(config.data)}
    try:
        train(words)
    except UserError:
        if cell.seed == SWEEP_SEED and has_diverged(folder):
            return known | dict.fromkeys(MEASURED)
        raise
    steps, last = records_of(folder)
    losses = last["validation"]
    model, length = config.model, config.training.sequence_length
    parameters = layer_parameters(model)
    skipped = [index for index, of in enumerate(model.layer_types) if index in shares_of(steps[-1])]
    return {
        **known,
        "steps": config.training.iterations,
        "tokens": steps[-1]["consumed_tokens"],
        "parameters": [
            sum(of for index, of in enumerate(parameters) if index not in skipped),
            sum(parameters[index] for index in skipped),
        ],
        "flops_per_token": training_flops(model, length) / length,
        "flops": training_flops(model, length) / length * steps[-1]["consumed_tokens"],
        "seconds": seconds_of(steps),
        "loss": losses["causal"],
        "topk": losses["topk"],
    }


def in_grid_order(rows: Sequence[Row]) -> list[Row]:
    """By budget, size, kind and seed: the order of tables does not depend on which run ended first."""
    sizes, kinds = list(SIZES), list(KINDS)
    cells = [(cell_of(row), row) for row in rows]
    cells.sort(key=lambda of: (of[0].budget, sizes.index(of[0].size), kinds.index(of[0].kind), of[0].seed))
    return [row for _, row in cells]


# ---- which runs, in which order --------------------------------------------------------------------------------------


def best_rate(rows: Sequence[Row], budget: float, overrides: tuple[str, ...]) -> float | None:
    """The rate at which the swept kinds have the lowest mean loss; None if a run of the sweep is missing. A rate at which one
    diverged is never the best. Raises UserError if there is no other."""
    losses = {cell_of(row): row["loss"] for row in rows}
    means = {}
    for rate in RATES:
        cells = [Cell(budget, SWEEP_SEED, SWEPT, kind, rate, overrides) for kind in SWEPT_KINDS]
        if not all(cell in losses for cell in cells):
            return None
        means[rate] = statistics.mean(math.inf if losses[cell] is None else losses[cell] for cell in cells)
    if min(means.values()) == math.inf:
        raise UserError(
            f"{budget:g} operations: at every rate of the sweep a run diverged; RATES of grid.py needs lower ones"
        )
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
    """Runs until nothing is left, `--most` are made, or `--minutes` are over; a run that has begun is finished. After a run
    that fails nothing new begins, the others are finished, and its error is raised."""
    end = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    left = math.inf if args.most is None else args.most
    overrides = tuple(args.overrides)
    if compared := [row for row in read_rows(results, ROW) if row["overrides"] == args.overrides]:
        check_text(compared, text_here(args.output))
    running: dict[Future[None], Cell] = {}

    def one(cell: Cell) -> None:
        row = run(cell, args.output)
        add_row(results, row)
        print(f"{cell}: {say_row(row)}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        while True:
            todo = next_cells(read_rows(results, ROW), overrides)
            ahead = [cell for cell in todo if cell not in running.values()]
            while ahead and len(running) < args.jobs and left and time.monotonic() < end:
                cell, left = ahead.pop(0), left - 1
                running[pool.submit(one, cell)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode(rows: Sequence[Row], output: Path) -> list[Row]:
    """Each kind at its best size of the largest whole budget, exported and decoded in turns, one random token at a time."""
    import torch

    best = at_optimum(grid_rows(rows), SIZES, KINDS)
    if not best:
        raise UserError("--decode: needs rows of every size and kind of a budget")
    exports = [exported(row, output) for row in best]
    torch.set_num_threads(1)
    figures, _ = generate.measure(generate.parse_args([*DECODED, "--export", *exports]), torch.device("cpu"))
    return [
        {name: row[name] for name in CELL}
        | {"tokens_per_second": figure.decode.tokens_per_second, "kv_bytes": figure.kv_bytes}
        for row, figure in zip(best, figures[1:], strict=True)  # behind a Qwen2
    ]


def exported(row: Row, output: Path) -> str:
    """The folder of the export of a row's run. Raises UserError unless the run was finished in `output`."""
    cell = cell_of(row)
    folder = Path(settled(command(cell, output)[1:]).output_dir)
    checkpoint = folder / f"checkpoints/iteration-{row['steps']:08d}"
    if not checkpoint.is_dir():
        raise UserError(
            f"--decode: {checkpoint} is not there; train {cell} there first: this command without --results and --decode"
        )
    path = str(output / "exports" / cell.kind)  # a name that Python can import: transformers asks for it
    tokenizer = str(output / "tokenizer")
    export.main(["--checkpoint", str(checkpoint), "--output", path, "--tokenizer", tokenizer, "--overwrite"])
    return path


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--most", type=positive, metavar="N", help="stop after N runs")
    parser.add_argument("--minutes", type=positive, metavar="M", help="begin no run after this time")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fit", action="store_true", help="print tables and the fit, draw them, run nothing")
    parser.add_argument("--decode", action="store_true", help="measure decoding, run nothing")
    parser.add_argument(
        "--again", type=positive, metavar="LINE", help="make this row of the results again, and compare"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    end_runs_on_signals()
    results = args.results or args.output / "results.jsonl"
    rows = read_rows(results, ROW)
    os.environ["DS_ACCELERATOR"] = args.device
    if args.again is not None:
        if args.again > len(rows):
            raise UserError(f"--again {args.again}: {results} has {len(rows)} rows")
        make_data(args.output)
        make_again(rows[args.again - 1], args.output)
        return 0
    if not args.fit and not args.decode:
        make_data(args.output)
        take_runs(args, results)
    rows = in_grid_order([row for row in read_rows(results, ROW) if row["overrides"] == args.overrides])
    measured = results.with_suffix(".decode.jsonl")
    if args.decode:
        others = [row for row in read_rows(measured, DECODED_ROW) if row["overrides"] != args.overrides]
        found = [json.dumps(row) + "\n" for row in [*others, *decode(rows, args.output)]]
        measured.write_text("".join(found))
    if rows:
        decoded = [row for row in read_rows(measured, DECODED_ROW) if row["overrides"] == args.overrides]
        said = "\n".join(parts_of_report(rows, decoded))
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.md").write_text(said)
        if args.fit and (runs := grid_rows(rows)):
            draw(runs, results.with_suffix(".png"))
        print(said)
    return 0


def make_again(before: Row, output: Path) -> None:
    """Raises UserError if the text is another one, or the loss comes out otherwise."""
    cell = cell_of(before)
    check_text([before], text_here(output))
    check_again(str(cell), run(cell, output, again=True)["loss"], before["loss"])
    print(f"{cell}: the same loss")


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
