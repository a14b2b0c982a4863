"""Forms of routing against a random choice and dense layers in one small setting, many seeds: DTF's gates, and training by
top-k or by the threshold.

    python examples/study/gate.py --output runs/gate [--seeds 4] [--most N] [--forms NAME ...] [key=value ...]
    python examples/study/gate.py --output runs/gate --results examples/study/gate.jsonl --most 0

Needs the tokenizer and datasets of `make quickstart`. Takes the runs that have no row in `results.jsonl` yet, one after another,
seed by seed: what is there is usable at any time, and you can stop the command and start it again. `--most 0` only prints
the table. `key=value` overrides apply to every run and are part of its row; the table is of the rows with the same ones.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadyn.arguments import count, positive
from megadyn.benchmark.experiments import (
    Row,
    add_options,
    add_row,
    check_again,
    check_text,
    end_runs_on_signals,
    folder_name,
    markdown,
    mean_and_spread,
    read_rows,
    records_of,
    seconds_of,
    shares_of,
    text_of,
    train,
)
from megadyn.config import load_config
from megadyn.errors import Parser, UserError, did_you_mean, run_tool
from megadyn.planning.flops import training_flops

HERE = Path(__file__).parent
ROUTED = ["model.routing.capacity=0.25", "model.routing.threshold_momentum=0.9"]
DTF, MOD = (["model.routing.kind=" + kind, *ROUTED] for kind in ("dtf", "mod"))
DTRNET = ["model.routing.kind=dtrnet", "model.routing.router_type=expert_choice", *ROUTED]
BY_THRESHOLD = "model.routing.choose=threshold"
FORMS: dict[str, list[str]] = {
    "dense, 4 layers": [],
    "dense, 3 layers": ["model.num_layers=3"],
    "random": ["model.routing.kind=fixed", "model.routing.capacity=0.25", "model.routing.score=random"],
    "mod": MOD,
    "mod, by threshold": [*MOD, BY_THRESHOLD],
    "dtf": DTF,
    "dtf, scale-free": [*DTF, "model.routing.scale_free=true"],
    "dtf, relative gate": [*DTF, "model.routing.relative_gate=true"],
    "dtf, both": [*DTF, "model.routing.scale_free=true", "model.routing.relative_gate=true"],
    "dtf, constant offsets": [*DTF, 'optimizer.freeze=["*.ce_log_offset", "*.cu_multiplier"]'],
    "dtf, by threshold": [*DTF, BY_THRESHOLD],
    "dtf, both, by threshold": [
        *DTF,
        "model.routing.scale_free=true",
        "model.routing.relative_gate=true",
        BY_THRESHOLD,
    ],
    "dtrnet": DTRNET,
    "dtrnet, by threshold": [*DTRNET, BY_THRESHOLD],
}
"""Every second of four layers processes a quarter of the tokens. `random` is the control that learns no choice; three dense
layers need more operations than 2.5, but no number of dense layers comes closer from above."""
CONTROL = "random"
ROW = ("form", "seed", "overrides", "text", "flops_per_token", "loss", "course")


def command(form: str, seed: int, output: Path, overrides: Sequence[str], *, again: bool) -> list[str]:
    """Configuration and overrides of a run; `again`: from the start, in a folder of its own."""
    name = folder_name(f"{form}-seed{seed}", overrides)
    return [
        str(HERE / "gate.yaml"),
        f"output_dir={output / ('again' if again else 'runs') / name}",
        *(["checkpoint.resume=never"] if again else []),
        f"training.seed={seed}",
        *FORMS[form],
        *overrides,
    ]


def text_here(overrides: Sequence[str]) -> str:
    return text_of(load_config(HERE / "gate.yaml", list(overrides)).data)


def run(form: str, seed: int, output: Path, overrides: Sequence[str], *, again: bool = False) -> Row:
    """Trains one model; the row of its last validation and of its gates on the way."""
    words = command(form, seed, output, overrides, again=again)
    folder = Path(words[1].partition("=")[2])
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    train(words)
    config = load_config(folder / "config.yaml")  # as it was run, with the vocabulary
    steps, last = records_of(folder)
    length = config.training.sequence_length
    shares = [share for step in steps[len(steps) // 2 :] for share in shares_of(step).values()]
    return {
        "form": form,
        "seed": seed,
        "overrides": list(overrides),
        "text": text_here(overrides),
        "flops_per_token": training_flops(config.model, length) / length,
        "loss": last["validation"]["causal"],
        "topk": last["validation"].get("topk"),
        "shares": [min(shares), statistics.mean(shares), max(shares)] if shares else None,
        "seconds": seconds_of(steps),
        "course": course_of(steps),
    }


def say_gap(runs: Sequence[Row]) -> str:
    """The causal loss minus that with top-k; nothing for forms that have only one."""
    gaps = [row["loss"] - row["topk"] for row in runs if row["shares"] and row["topk"] is not None]
    return f"{statistics.mean(gaps):z.4f}" if gaps else "-"


def say_shares(runs: Sequence[Row]) -> str:
    """Share of the tokens that a layer took in the second half of the run: mean, and the range over layers, reports and seeds."""
    found = [row["shares"] for row in runs if row["shares"]]
    if not found:
        return "-"
    least, most = min(of[0] for of in found), max(of[2] for of in found)
    return f"{statistics.mean(of[1] for of in found):.3f} ({least:.3f} to {most:.3f})"


WATCHED = ("S_CE", "S_CU", "gate_routed", "gate_unrouted", "causal_agreement", "cu_multiplier", "D_st")


def course_of(steps: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Means over layers of what was watched, at ten reports spread over the run."""
    picked = [steps[(len(steps) - 1) * part // 9] for part in range(10)]
    course = []
    for step in picked:
        layers = step.get("routing", {}).values()
        found = {name: [of[name] for of in layers if of.get(name) is not None] for name in WATCHED}
        course.append(
            {"iteration": step["iteration"]}
            | {name: round(statistics.mean(of), 5) for name, of in found.items() if of}
        )
    return course


def table(rows: Sequence[Row]) -> str:
    """A line per form: operations per token, causal loss, its difference from the control with the same seed, what top-k's loss
    is below it, shares, and the gates at the first and last report."""
    control = {row["seed"]: row["loss"] for row in rows if row["form"] == CONTROL}
    lines = []
    for form in FORMS:
        runs = [row for row in rows if row["form"] == form]
        if not runs:
            continue
        less = [row["loss"] - control[row["seed"]] for row in runs if row["seed"] in control]

        def way(name: str, runs: Sequence[Row] = runs) -> str:
            ends = [
                [row["course"][place][name] for row in runs if name in row["course"][place]]
                for place in (0, -1)
            ]
            return " to ".join(f"{statistics.mean(of):.2f}" for of in ends) if all(ends) else "-"

        lines.append(
            [
                form,
                str(len(runs)),
                f"{runs[0]['flops_per_token'] / 1e6:.2f}",
                mean_and_spread([row["loss"] for row in runs]),
                "-" if form == CONTROL or not less else mean_and_spread(less),
                say_gap(runs),
                say_shares(runs),
                *(way(name) for name in ("gate_routed", "gate_unrouted", "S_CE", "S_CU", "causal_agreement")),
            ]
        )
    head = [
        "form",
        "seeds",
        "MFLOP",
        "loss",
        f"minus {CONTROL}",
        "gap",
        "share",
        "gate",
        "gate of others",
        "S_CE",
        "S_CU",
        "agreement",
    ]
    return markdown(head, lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=positive, default=4)
    parser.add_argument("--most", type=count, metavar="N", help="stop after N runs")
    parser.add_argument(
        "--again", type=positive, metavar="LINE", help="make this row of the results again, and compare"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    end_runs_on_signals()
    for form in args.forms:
        if form not in FORMS:
            raise UserError(f"--forms {form}: no form of gate.py{did_you_mean(form, FORMS)}")
    results = args.results or args.output / "results.jsonl"
    rows = read_rows(results, ROW)
    if args.again is not None:
        if args.again > len(rows):
            raise UserError(f"--again {args.again}: {results} has {len(rows)} rows")
        before = rows[args.again - 1]
        check_text([before], text_here(before["overrides"]))
        row = run(before["form"], before["seed"], args.output, before["overrides"], again=True)
        name = f"{row['form']}, seed {row['seed']}"
        check_again(name, row["loss"], before["loss"])
        print(f"{name}: the same loss")
        return 0
    there = {(row["form"], row["seed"], tuple(row["overrides"])) for row in rows}
    wanted = [(form, seed, tuple(args.overrides)) for seed in range(1, args.seeds + 1) for form in args.forms]
    todo = [key for key in wanted if key not in there][: args.most]
    compared = [row for row in rows if row["overrides"] == args.overrides]
    if todo and compared:
        check_text(compared, text_here(args.overrides))
    for form, seed, overrides in todo:
        row = run(form, seed, args.output, overrides)
        add_row(results, row)
        print(f"{form}, seed {seed}: loss {row['loss']:.4f} after {row['seconds']:.0f} s", flush=True)
    rows = [row for row in read_rows(results, ROW) if row["overrides"] == args.overrides]
    if rows:
        print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
