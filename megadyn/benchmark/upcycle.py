"""What a dense model loses when it becomes a routed one, and after how many steps it has regained it.

    megadyn benchmark upcycle [--config examples/quickstart/config.yaml] [--dense-steps 400] [--steps 200]
                              [--cases dtf-default,mod-default] [--output runs/upcycle] [key=value ...]

Trains a dense model from the seed, exports it, and goes on from the export (`checkpoint.init_from`): once as the dense model
that it is, and once as every kind of routing with its default settings. All of these see the same new samples, at a constant
tenth of the configuration's learning rate, with ten times that for routers and priors. The table has the validation loss at
step 0, when routers and priors are new, the first evaluation at which it is no higher than the dense model's was at step 0, and
the loss at the end, beside that of the dense model after as many steps. Needs the data that the configuration names
(`make quickstart` makes the default's).
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.benchmark.soak import RULES, problem_of_job
from megadyn.config import load_config
from megadyn.config.data import UNNAMED
from megadyn.errors import RunError
from megadyn.files import refuse_existing
from megadyn.kinds import DENSE
from megadyn.paths import user_path

DEFAULTS = tuple(rule for rule in RULES if rule.endswith("-default"))
SLOWER, ROUTERS = 10, 10
"""The learning rate is divided by SLOWER, and that of routers and priors multiplied by ROUTERS."""
EVALUATIONS = 20
"""Evaluations between the first step and the last."""
Losses = Mapping[str, Mapping[int, float]]
"""By routing mode and iteration."""


@dataclass
class Regained:
    """One upcycled model; losses are on the validation set, `causal` with the causal rule."""

    case: str
    share: float
    """Of tokens that routed layers process, as planned; 1 for the dense model."""
    start: float
    start_causal: float
    regained: int | None
    """First evaluated step whose loss is at most the dense model's at step 0; None if there was none."""
    regained_causal: int | None
    end: float
    end_causal: float


def judged(case: str, share: float, losses: Losses, wanted: float) -> Regained:
    """`wanted`: the dense model's loss at step 0."""

    def first(mode: str) -> int | None:
        return next((step for step, loss in sorted(losses[mode].items()) if loss <= wanted), None)

    ends = {mode: of_mode[max(of_mode)] for mode, of_mode in losses.items()}
    return Regained(
        case,
        share,
        losses["topk"][0],
        losses["causal"][0],
        first("topk"),
        first("causal"),
        ends["topk"],
        ends["causal"],
    )


def validation(metrics: Path) -> Losses:
    """The validation losses in a run's metrics."""
    found: dict[str, dict[int, float]] = {"topk": {}, "causal": {}}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        for mode, loss in (record.get(UNNAMED) or {}).items():
            found.setdefault(mode, {})[record["iteration"]] = loss
    return found


def train(folder: Path, args: argparse.Namespace, *overrides: str) -> Losses:
    """Runs the main job in `folder`; raises RunError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = ["logging.tensorboard=false", "logging.live=never", "parallel.tensor=1", "parallel.pipeline=1"]
    words = [str(args.config), *args.overrides, *shared, f"output_dir={folder}", *overrides]
    if problem := problem_of_job(words, 1, folder):
        raise RunError(f"{folder}: {problem}")
    return validation(folder / "metrics.jsonl")


def measure(args: argparse.Namespace) -> list[Regained]:
    from megadyn.checkpoint.export import export
    from megadyn.checkpoint.layout import resolve

    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["megadyn.pretrain", "megadyn.engine.engine"]
    )
    folder, start = args.output, args.output / "dense.hf"
    whole = [*dense(), f"training.iterations={args.dense_steps}"]
    base = load_config(args.config, [*args.overrides, *whole])
    rate = base.optimizer.learning_rate / SLOWER
    train(folder / "dense", args, *whole)
    export(resolve(folder / "dense"), start)
    continued = [
        f"checkpoint.init_from={start}",
        f"training.iterations={args.steps}",
        f"training.eval_interval={max(1, args.steps // EVALUATIONS)}",
        f"training.seed={base.training.seed + 1}",  # other samples than the dense model has seen
        "optimizer.schedule=constant",
        "optimizer.warmup_iterations=0",
        f"optimizer.learning_rate={rate}",
        "optimizer.min_learning_rate=0",
        f"optimizer.multipliers.router={ROUTERS}",
        f"optimizer.multipliers.prior={ROUTERS}",
        "checkpoint.interval=0",
    ]
    control = train(folder / "continued-dense", args, *dense(), *continued)
    wanted = control["topk"][0]
    found = [judged(DENSE, 1.0, control, wanted)]
    for case in args.cases:
        keys = [f"model.routing.{key}={value}" for key, value in RULES[case].items()]
        routed = load_config(args.config, [*args.overrides, *keys, *continued]).model.routing
        losses = train(folder / f"continued-{case}", args, *keys, *continued)
        found.append(judged(case, routed.share, losses, wanted))
        print(f"{case}: {found[-1].start:.3f} at step 0", file=sys.stderr, flush=True)
    return found


def dense() -> list[str]:
    return [f"model.routing.kind={DENSE}"]


def as_table(found: Sequence[Regained]) -> str:
    rows = [
        "| model | planned share | loss at step 0, top-k / causal | regained at step, top-k / causal | "
        "loss at the end, top-k / causal |",
        "|---|---|---|---|---|",
    ]

    def step(number: int | None) -> str:
        return "not yet" if number is None else str(number)

    rows += [
        f"| {one.case} | {one.share:g} | {one.start:.3f} / {one.start_causal:.3f} | "
        f"{step(one.regained)} / {step(one.regained_causal)} | {one.end:.3f} / {one.end_causal:.3f} |"
        for one in found
    ]
    return "\n".join(rows)


def cases_of(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if strange := [name for name in names if name not in RULES]:
        raise argparse.ArgumentTypeError(f"no case {strange[0]!r}; there are {', '.join(RULES)}")
    return names


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark upcycle", __doc__)
    parser.add_argument(
        "--config",
        type=user_path,
        default=Path("examples/quickstart/config.yaml"),
        metavar="FILE",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--dense-steps",
        type=positive,
        default=400,
        metavar="N",
        help="steps of the dense model before it is upcycled (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive, default=200, metavar="N", help="steps of each (default: %(default)s)"
    )
    parser.add_argument(
        "--cases",
        type=cases_of,
        default=DEFAULTS,
        metavar="NAME,...",
        help=f"of {', '.join(RULES)} (default: those with default settings)",
    )
    parser.add_argument(
        "--output", type=user_path, default=Path("runs/upcycle"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier runs in DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.config, args.output = args.config.absolute(), args.output.absolute()
    refuse_existing([args.output], args.overwrite)
    rmtree(args.output, ignore_errors=True)
    found = measure(args)
    print(as_table(found))
    if args.json:
        print(json.dumps([asdict(one) for one in found]))
