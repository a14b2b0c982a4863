"""How far training under a parallel layout differs from one process, with the layout's own routing choices and with
recorded ones.

    megadyn benchmark flips [--config examples/quickstart/config.yaml] [--steps 200] [--layout 2x1x1] [key=value ...]

Trains three times, from the same weights on the same samples: on one process, which records its routing choices; under
the layout with its own choices; and under the layout with the recorded choices, noting what it would have chosen.
Prints how far losses and gradient norms differ, how many choices changed (a token was taken in one run and not in the
other), and how far the scores of these tokens were from the cut, in units of the root mean square of the layer's scores
in that step. Needs the data that the configuration names (`make quickstart` makes the default's). Exit status 1 if,
with the recorded choices, a loss or gradient norm of the first `--hold` steps differs by more than 1e-5. Over more
steps, curves stay together only at a low learning rate: training at a high rate amplifies any rounding difference, with
any model.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.benchmark.scaling import Layout, layout_of
from megadyn.benchmark.soak import curves_of, problem_of_job
from megadyn.benchmark.soak_bounds import Curves
from megadyn.config import load_config
from megadyn.errors import RunError
from megadyn.files import refuse_existing
from megadyn.paths import user_path
from megadyn.routing.recording import flips

PROMISED = 1e-5
"""Largest allowed relative difference of losses and gradient norms between layouts that make the same choices."""
CHOICES = "choices"
"""Folder of the recording inside a run's output folder."""


@dataclass
class Comparison:
    """A run compared with that of one process."""

    run: str
    steps: int
    loss: float
    """Largest relative difference in the loss of a step."""
    grad_norm: float
    together: int
    """Steps before loss or gradient norm first differs by more than `PROMISED`."""
    compared: int
    """Number of choices compared."""
    changed: int
    first_step: int | None
    """First step in which a choice changed; None if none did."""
    first_changed: int
    """Number of changed choices in that step, in the first layer that has any."""
    first_farthest: float
    """Largest distance from the cut among these."""
    farthest: float
    """Largest distance from the cut in all steps."""
    seconds: float


def train(folder: Path, layout: Layout, args: argparse.Namespace, *overrides: str) -> tuple[Curves, float]:
    """Runs the main job in `folder`; returns its curves and its seconds. Raises RunError if the run fails."""
    folder.mkdir(parents=True)
    began = time.perf_counter()
    problem = problem_of_job(
        [
            str(args.config),
            *args.overrides,
            "training.eval_interval=0",
            "checkpoint.interval=0",
            "checkpoint.resume=never",
            "logging.interval=1",
            "logging.tensorboard=false",
            "logging.live=never",
            f"parallel.tensor={layout.tensor}",
            f"parallel.pipeline={layout.pipeline}",
            f"output_dir={folder}",
            f"training.routing_record={folder / CHOICES}",
            *overrides,
        ],
        layout.processes,
        folder,
    )
    if problem:
        raise RunError(f"{folder}: {problem}")
    print(f"{folder.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return curves_of(folder / "metrics.jsonl"), time.perf_counter() - began


def apart(found: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Relative difference per step."""
    return [abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True)]


def compare(
    name: str, whole: Path, folder: Path, wanted: Curves, found: Curves, seconds: float
) -> Comparison:
    moved = flips(whole / CHOICES, folder / CHOICES)
    first = moved.first
    losses, norms = apart(found.loss, wanted.loss), apart(found.grad_norm, wanted.grad_norm)
    together = next(
        (step for step, pair in enumerate(zip(losses, norms, strict=True)) if max(pair) > PROMISED),
        len(losses),
    )
    return Comparison(
        name,
        len(losses),
        max(losses),
        max(norms),
        together,
        moved.compared,
        moved.changed,
        int(first.steps[0]) if first.changed else None,
        first.changed,
        first.farthest,
        moved.farthest,
        seconds,
    )


def measure(args: argparse.Namespace) -> list[Comparison]:
    folders = [args.output / name for name in ("one", "own", "replayed")]
    refuse_existing(folders, args.overwrite)
    for folder in folders:
        rmtree(folder, ignore_errors=True)
    one, own, replayed = folders
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["megadyn.pretrain", "megadyn.engine.engine"]
    )
    wanted, _ = train(one, Layout(1, 1, 1), args)
    free = train(own, args.layout, args)
    held = train(replayed, args.layout, args, f"training.routing_replay={one / CHOICES}")
    return [compare("own", one, own, wanted, *free), compare("recorded", one, replayed, wanted, *held)]


def as_table(found: Sequence[Comparison]) -> str:
    rows = [
        "| choices | steps within 1e-5 | largest difference in loss | in gradient norm | changed choices | first change |",
        "|---|---|---|---|---|---|",
    ]
    for line in found:
        first = "none"
        if line.first_step is not None:
            first = f"step {line.first_step}: {line.first_changed}, at most {line.first_farthest:.1e} from the cut"
        rows.append(
            f"| {line.run} | {line.together} | {line.loss:.1e} | {line.grad_norm:.1e} | {line.changed:,} of "
            f"{line.compared:,}, at most {line.farthest:.1e} from the cut | {first} |"
        )
    return "\n".join(rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark flips", __doc__)
    parser.add_argument(
        "--config",
        type=user_path,
        default=Path("examples/quickstart/config.yaml"),
        metavar="FILE",
        help="(default: %(default)s)",
    )
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--hold",
        type=positive,
        default=10,
        metavar="N",
        help="steps in which losses and gradient norms must agree within 1e-5 (default: %(default)s)",
    )
    parser.add_argument(
        "--layout", type=layout_of, default=Layout(2, 1, 1), metavar="TxPxD", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=user_path, default=Path("runs/flips"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier runs in DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.config, args.output = args.config.absolute(), args.output.absolute()
    args.overrides.append(f"training.iterations={args.steps}")
    config = load_config(args.config, args.overrides)  # report a mistake in it before training
    found = measure(args)
    print(
        f"{config.model.routing.describe()}, {config.precision}, {args.steps} steps; {args.layout} (tensor x pipeline x data) "
        "against one process\n"
    )
    print(as_table(found))
    if args.json:
        print(json.dumps([asdict(line) for line in found]))
    if found[-1].together < min(args.hold, args.steps):
        raise SystemExit(1)
