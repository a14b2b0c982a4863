"""Models on a generated language in which it is known which tokens need depth; one row per run, tables and figures.

    python examples/probe/probe.py --output runs/probe [--models dense_8 dense_4 ...] [--seeds 3] [--most N] [key=value ...]

Generates the data if they are not there. Then trains and measures what is not in `results.jsonl` yet, one run after another on
one thread each: all models with seed 1, then all with seed 2, and so on, so that what is there is usable at any time. You can
stop it and start it again; `--most 0` only generates the data and draws again. A model is a configuration of this folder.
`key=value` overrides apply to every run and are part of its row. With `--again`, rows that are there are made once more and
compared: their loss must come out within 1e-3.
"""

import argparse
import math
import shutil
import statistics
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megadyn.arguments import count, positive
from megadyn.benchmark.experiments import (
    Row,
    add_options,
    add_row,
    check_again,
    folder_name,
    markdown,
    mean_and_spread,
    pyplot,
    read_rows,
    records_of,
    shares_of,
    train,
)
from megadyn.config import load_config
from megadyn.data.record import read_record
from megadyn.errors import ConfigError, Parser, UserError, did_you_mean, run_tool
from megadyn.planning.flops import training_flops
from megadyn.planning.parameters import total_parameters
from megadyn.prepare.probe import ANSWERS, Language, write_dataset, write_tokenizer

HERE = Path(__file__).parent
MODELS = (
    *("dense_8", "dense_4", "dense_2"),
    *("fixed_random", "mod", "dtf", "dense_6", "dense_5"),
    "oracle",
    *("subskip", "dtrnet", "stt", "nested", "skip_middle", "fixed_stride", "dense_narrow"),
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


def run(model: str, seed: int, output: Path, overrides: Sequence[str], *, again: bool = False) -> Row:
    """Trains and measures one model; draws its first validation document if it routes."""
    words = command(model, seed, output, overrides, again=again)
    config = load_config(words[0], words[1:])
    config.model.vocab_size = len(LANGUAGE.vocabulary)
    if config.training.sequence_length != LANGUAGE.length:
        raise ConfigError(
            "training.sequence_length", config.training.sequence_length, f"{LANGUAGE.length}, a document"
        )
    if again:
        shutil.rmtree(config.output_dir, ignore_errors=True)
    start = time.perf_counter()
    if model == "oracle":
        from oracle import write_oracle  # beside this file

        told = Path(config.output_dir) / "told"
        write_oracle(load_config(words[0], words[1:]), told)
        words.append(f"training.routing_replay={told}")
    train(words)
    seconds = time.perf_counter() - start
    from megadyn.evaluation.by_label import measure  # seconds of imports, which help and mistakes do without

    measured = measure(Path(config.output_dir), output / "data/validation")
    length = config.training.sequence_length
    shares = {int(layer): found["share"] for layer, found in measured.result["layers"].items()}
    steps, last = records_of(Path(config.output_dir))
    if shares:
        draw_sample(measured, Path(config.output_dir) / "sample.png", f"{model}, seed {seed}")
    return {
        "model": model,
        "seed": seed,
        "overrides": list(overrides),
        "layers_of_model": config.model.num_layers,
        "kind": config.model.routing.describe(),
        "steps": config.training.iterations,
        "parameters": total_parameters(config.model),
        "flops_per_token": training_flops(config.model, length, shares) / length,
        "seconds": round(seconds, 1),
        "validation": last["validation"],
        "shares": [list(shares_of(step).values()) for step in steps[len(steps) // 2 :]] if shares else [],
        **measured.result,
    }


def key_of(row: Row) -> tuple[str, int, tuple[str, ...]]:
    return row["model"], row["seed"], tuple(row["overrides"])


# ---- tables ----------------------------------------------------------------------------------------------------------


def groups_of(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """Class and hops of what can be predicted, in order: text, then answers."""
    found = {(group["class"], group["hops"]) for row in rows for group in row["groups"]}
    deep = sorted(
        (group for group in found if group[0] in ANSWERS), key=lambda of: (ANSWERS.index(of[0]), of[1])
    )
    return [("text", 0), *deep]


def name_of(group: tuple[str, int]) -> str:
    return f"{group[0]} {group[1]}" if group[1] else group[0]


def values(rows: Sequence[Row], group: tuple[str, int], key: str) -> list[Any]:
    """A value of this group, per row."""
    return [of[key] for row in rows for of in row["groups"] if (of["class"], of["hops"]) == group]


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by model and overrides, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(" ".join([row["model"], *row["overrides"]]), []).append(row)
    return found


def is_dense(row: Row) -> bool:
    """Whether every layer of the model processes every token."""
    return bool(row["kind"] == "dense") and not row["overrides"]


def say_capacity(name: str) -> str:
    """A model's name with its overrides, as short as it can be read."""
    return name.replace("model.routing.", "")


def loss_table(rows: Sequence[Row]) -> str:
    """Of the dense models, a column for each, means over seeds: loss and accuracy by class and hops."""
    models = by_model([row for row in rows if is_dense(row)])
    lines = [["seeds", *(str(len(runs)) for runs in models.values())]]
    for group in groups_of(rows):
        cells = []
        for runs in models.values():
            losses, accuracies = (values(runs, group, key) for key in ("within", "accuracy"))
            cells.append(f"{mean_and_spread(losses)} ({statistics.mean(accuracies):.0%})" if losses else "-")
        lines.append([name_of(group), *cells])
    return markdown(["", *models], lines)


def accuracy_table(rows: Sequence[Row]) -> str:
    """A line per model, means over seeds, from the best: operations, loss, what top-k's loss is below it, accuracy by class."""
    groups = [group for group in groups_of(rows) if group != ("text", 0)]
    lines = []
    for name, runs in by_model(rows).items():
        gaps = [
            row["validation"]["causal"] - row["validation"]["topk"]
            for row in runs
            if "topk" in row.get("validation", {})
        ]
        accuracies = [values(runs, group, "accuracy") for group in groups]
        lines.append(
            (
                statistics.mean(row["loss"] for row in runs),
                [
                    say_capacity(name),
                    str(len(runs)),
                    f"{statistics.mean(row['flops_per_token'] for row in runs) / 1e6:.1f}",
                    mean_and_spread([row["loss"] for row in runs]),
                    f"{statistics.mean(gaps):.4f}" if gaps and runs[0]["layers"] else "-",
                    *(f"{statistics.mean(of):.0%}" if of else "-" for of in accuracies),
                ],
            )
        )
    head = ["model", "seeds", "MFLOP", "loss", "gap", *map(name_of, groups)]
    return markdown(head, [line for _, line in sorted(lines, key=lambda of: of[0])])


def choice_table(rows: Sequence[Row]) -> str:
    """Per routed layer, mean over seeds: share chosen of all tokens and by class and hops, and the area under the curve."""
    routed = [row for row in rows if row["layers"]]
    groups = [("table", 0), *groups_of(routed)]
    lines = []
    for name, runs in by_model(routed).items():
        for layer in runs[0]["layers"]:
            found = [row["layers"][layer] for row in runs]
            areas = [of["area"] for of in found if of["area"] is not None]
            shares = [[of[layer] for of in values(runs, group, "chosen")] for group in groups]
            lines.append(
                [
                    say_capacity(name),
                    layer,
                    f"{statistics.mean(of['share'] for of in found):.0%}",
                    mean_and_spread(areas) if areas else "-",
                    *(f"{statistics.mean(share):.0%}" if share else "-" for share in shares),
                ]
            )
    return markdown(["model", "layer", "chosen", "area", *map(name_of, groups)], lines) if lines else ""


def tables(rows: Sequence[Row]) -> list[str]:
    """Those of which there are rows."""
    return [table for table in (accuracy_table(rows), loss_table(rows), choice_table(rows)) if table]


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw_depth(rows: Sequence[Row], path: Path) -> None:
    """Of the models in which no layer chooses: loss of a list's state against its steps, and of all else against depth."""
    dense = [row for row in rows if is_dense(row) and row["model"] != "dense_narrow"]
    of_depth = {
        depth: [row for row in dense if row["layers_of_model"] == depth]
        for depth in sorted({row["layers_of_model"] for row in dense})
    }
    groups = groups_of(dense)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for depth, runs in of_depth.items():
        found = {group[1]: values(runs, group, "within") for group in groups if group[0] == "state"}
        draw_means(left, found, "-", f"{depth} layers")
    left.set_xlabel("permutations in the list")
    left.set_ylabel("loss of the answer among its class, nats")
    for group in groups:
        if group[0] != "state":
            found = {depth: values(runs, group, "within") for depth, runs in of_depth.items()}
            draw_means(right, found, {"text": ":", "sum": "--"}.get(group[0], "-"), name_of(group))
    right.set_xlabel("dense layers")
    right.set_xticks(list(of_depth))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def draw_lists(rows: Sequence[Row], path: Path) -> None:
    """Of every model: accuracy on lists by their steps; and the share of these positions that its routed layers took."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name, runs in by_model(rows).items():
        label = textwrap.shorten(
            say_capacity(name), 40, placeholder=" ..."
        )  # the legend must fit into the figure
        of_list = [group for group in groups_of(runs) if group[0] == "state"]
        found = {group[1]: values(runs, group, "accuracy") for group in of_list}
        look = {"color": str(1 - runs[0]["layers_of_model"] / 10), "lw": 1} if is_dense(runs[0]) else {}
        line = draw_means(left, found, "--" if look else "-", label, **look)
        taken = {
            group[1]: [statistics.mean(of.values()) for of in values(runs, group, "chosen")]
            for group in of_list
            if runs[0]["layers"]
        }
        if taken:
            draw_means(right, taken, "-", label, color=line.get_color())
    left.set_ylabel("accuracy, routed causally")
    right.set_ylabel("share of positions in routed layers")
    for axis in (left, right):
        axis.set_xlabel("permutations in the list: steps needed")
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def draw_means(axis: Any, found: dict[int, list[float]], style: str, label: str, **look: Any) -> Any:
    """A line through the means of what was found at each place, and a dot for each value."""
    means = [statistics.mean(of) if of else math.nan for of in found.values()]
    line = axis.plot(list(found), means, style, label=label, **look)[0]
    for place, of in found.items():
        axis.scatter([place] * len(of), of, s=14, color=line.get_color())
    return line


def draw_sample(measured: Any, path: Path, title: str) -> None:
    """The first document: above, the steps that each token needs to predict the next; below, what each layer processed."""
    length = measured.length
    words = [LANGUAGE.vocabulary[token] for token in measured.passed.tokens[:length]]
    needed = measured.passed.hops[:length].astype(float)
    chosen = [mask[:length].astype(float) for mask in measured.passed.chosen.values()]
    figure, (above, below) = pyplot().subplots(
        2, 1, figsize=(0.19 * length + 1.5, 1.6 + 0.25 * len(chosen)), layout="constrained", sharex=True,
        height_ratios=[1, max(1, len(chosen))],
    )  # fmt: skip
    above.imshow(needed[None], aspect="auto", cmap="Oranges", vmin=0, vmax=max(1.0, needed.max()))
    above.set_yticks([0], ["steps needed"])
    below.imshow(np.stack(chosen), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    below.set_yticks(range(len(chosen)), [f"layer {layer}" for layer in measured.passed.chosen])
    below.set_xticks(range(length), words, rotation=90, fontsize=7)
    above.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


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
        draw_lists(rows, args.output / "lists.png")
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
