"""Models on a generated language in which it is known which tokens need depth; one row per run, tables and figures.

    python examples/probe/probe.py --output runs/probe [--models dense_8 dense_4 ...] [--seeds 3] [--most N] [key=value ...]

Generates the data if they are not there. Then trains and measures what is not in `results.jsonl` yet, one run after another on
one thread each: all models with seed 1, then all with seed 2, and so on, so that what is there is usable at any time. You can
stop it and start it again; `--most 0` only generates the data and draws again. A model is a configuration of this folder.
`key=value` overrides apply to every run and are part of its row. With `--again`, rows that are there are made once more and
compared: their loss must come out within 1e-3.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from probe_tables import draw_all_lists, draw_depth, draw_samples, tables

from megadyn.arguments import count, positive
from megadyn.benchmark.experiments import (
    Row,
    add_options,
    add_row,
    check_again,
    end_runs_on_signals,
    folder_name,
    read_rows,
    records_of,
    run_python,
    seconds_of,
    train,
)
from megadyn.config import Config, load_config
from megadyn.data.record import read_record
from megadyn.errors import ConfigError, Parser, UserError, did_you_mean, run_tool
from megadyn.planning.flops import training_flops
from megadyn.planning.parameters import total_parameters
from megadyn.prepare.probe import Language, write_dataset, write_tokenizer

HERE = Path(__file__).parent
MODELS = (
    *("dense_8", "dense_4", "dense_2"),
    *("fixed_random", "mod", "dtf", "dense_6", "dense_5"),
    "oracle",
    *("subskip", "dtrnet", "stt", "nested", "skip_middle", "fixed_stride", "dense_narrow"),
    "mod_from_oracle",
)
"""Configurations of this folder, in the order in which they are run."""
LANGUAGE = Language()
DATA = {"train": (65_536, 1), "validation": (1024, 2)}
"""Documents and seed of each dataset."""
ROW = ("model", "seed", "overrides", "groups", "layers")
"""What each row has, at least."""


# ---- data and runs ---------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Tokenizer and datasets under `folder`, unless they are there. Raises UserError if those are of another language."""
    write_tokenizer(LANGUAGE, folder / "tokenizer")
    for name, (documents, seed) in DATA.items():
        prefix = folder / name
        record = read_record(Path(f"{prefix}.json"))
        if record is None or not Path(f"{prefix}.labels").exists():
            write_dataset(LANGUAGE, prefix, documents, seed, folder / "tokenizer")
        elif record.source != [f"generated: {LANGUAGE}, seed {seed}"] or record.documents != documents:
            raise UserError(f"{prefix}: was generated otherwise; remove {folder}, or name another --output")


def command(
    model: str, seed: int, output: Path, overrides: Sequence[str], *, again: bool = False
) -> list[str]:
    """Configuration and overrides of a run; `again`: from the start, in a folder of its own."""
    data = output / "data"
    name = folder_name(f"seed{seed}", overrides)
    folder = (output / "again" if again else output) / model / name
    return [
        str(HERE / f"{model}.yaml"),
        f"training.seed={seed}",
        f"output_dir={folder}",
        *(["checkpoint.resume=never"] if again else []),
        f"tokenizer.path={data / 'tokenizer'}",
        *(f"data.{name}={data / name}" for name in DATA),
        *overrides,
    ]


def trained(
    model: str, seed: int, output: Path, overrides: Sequence[str], *, again: bool
) -> tuple[Config, list[Row], Row]:
    """Trains a model to its end, unless that is done, and what it starts from. Returns its configuration, the records of its
    steps, and that of its last validation."""
    words = command(model, seed, output, overrides, again=again)
    config = load_config(words[0], words[1:])
    if config.training.sequence_length != LANGUAGE.length:
        raise ConfigError(
            "training.sequence_length", config.training.sequence_length, f"{LANGUAGE.length}, a document"
        )
    folder = Path(config.output_dir)
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    if model == "oracle":
        from oracle import write_oracle  # beside this file

        write_oracle(load_config(words[0], words[1:]), folder / "told")
        words.append(f"training.routing_replay={folder / 'told'}")
    if model == "mod_from_oracle":
        told, *_ = trained("oracle", seed, output, overrides, again=again)
        export = ["--checkpoint", told.output_dir, "--output", str(folder / "start"), "--overwrite"]
        run_python(["-m", "megadyn", "export", *export])
        words.append(f"checkpoint.init_from={folder / 'start'}")
    train(words)
    return config, *records_of(folder)


def run(model: str, seed: int, output: Path, overrides: Sequence[str], *, again: bool = False) -> Row:
    """Trains and measures one model. Operations are counted at the mean shares of the second half of training, statistics that
    are fractions are averaged over it."""
    config, steps, last = trained(model, seed, output, overrides, again=again)
    config.model.vocab_size = len(LANGUAGE.vocabulary)
    from megadyn.evaluation.by_label import measure  # seconds of imports, which help and mistakes do without

    measured = measure(Path(config.output_dir), output / "data/validation")
    length = config.training.sequence_length
    fractions = fractions_of(steps[len(steps) // 2 :])
    shares = {int(layer): found["routed_fraction"] for layer, found in fractions.items()}
    return {
        "model": model,
        "seed": seed,
        "overrides": list(overrides),
        "layers_of_model": config.model.num_layers,
        "kind": config.model.routing.describe(),
        "steps": last["iteration"],
        "parameters": total_parameters(config.model),
        "flops_per_token": training_flops(config.model, length, shares) / length,
        "seconds": seconds_of(steps),
        "validation": last["validation"],
        "fractions": fractions,
        "sample": {str(layer): marks_of(mask[:length]) for layer, mask in measured.passed.chosen.items()},
        **measured.result,
    }


def fractions_of(steps: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By routed layer: means of the statistics that are shares of tokens, by name."""
    found: dict[str, dict[str, list[float]]] = {}
    for step in steps:
        for layer, measured in step.get("routing", {}).items():
            if "routed_fraction" not in measured:
                continue
            for name in measured:
                if name.endswith("_fraction"):
                    found.setdefault(layer, {}).setdefault(name, []).append(measured[name])
    return {
        layer: {name: statistics.mean(of) for name, of in names.items()} for layer, names in found.items()
    }


def marks_of(mask: NDArray[np.bool_]) -> str:
    """A digit per token: 1 for chosen ones."""
    return "".join("01"[int(chosen)] for chosen in mask)


def key_of(row: Row) -> tuple[str, int, tuple[str, ...]]:
    return row["model"], row["seed"], tuple(row["overrides"])


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, metavar="NAME", help="configurations of this folder"
    )
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--most", type=count, metavar="N", help="stop after N runs")
    parser.add_argument(
        "--again", action="store_true", help="make the rows that are there once more, and compare"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    end_runs_on_signals()
    for model in args.models:
        if model not in MODELS:
            raise UserError(f"--models {model}: no configuration of the probe{did_you_mean(model, MODELS)}")
    results = args.results or args.output / "results.jsonl"
    there = {key_of(row): row for row in read_rows(results, ROW)}
    make_data(args.output / "data")
    wanted = [
        (model, seed, tuple(args.overrides)) for seed in range(1, args.seeds + 1) for model in args.models
    ]
    todo = [key for key in wanted if (key in there) == args.again]
    for key in todo[: args.most]:
        row = run(*key[:2], args.output, key[2], again=args.again)
        print(
            f"{row['model']}, seed {row['seed']}: loss {row['loss']:.4f} after {row['seconds']:.0f} s",
            flush=True,
        )
        if args.again:
            check_again(f"{row['model']}, seed {row['seed']}", row["loss"], there[key]["loss"])
        else:
            add_row(results, row)
    if rows := read_rows(results, ROW):
        text = "\n".join(tables(rows))
        (args.output / "table.md").write_text(text)
        draw_depth(rows, args.output / "depth.png")
        draw_all_lists(rows, args.output)
        draw_samples(rows, LANGUAGE, args.output / "data/validation", args.output / "samples.png")
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
