"""Average the weights of checkpoints of one model into another checkpoint.

Give checkpoints, each the folder of one or of a run for its newest, or one run's folder and --last N. They may come from
different layouts. The result holds weights and thresholds; evaluate, export and checkpoint.fork_from take it like any
other checkpoint. It has no optimizer state: a fork begins with moments of zero.

    megadyn average runs/quickstart --last 2 --output averaged
    megadyn average runs/a runs/b runs/c --output soup
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.checkpoint.layout import CHECKPOINTS, complete_checkpoints, reservation, resolve
from megadyn.errors import Parser, UserError
from megadyn.log import log
from megadyn.paths import user_path


def make_parser() -> Parser:
    parser = command_parser("average", __doc__)
    parser.add_argument("checkpoints", type=user_path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument(
        "--ema",
        type=decay,
        metavar="DECAY",
        help="a moving average that keeps this share at each later checkpoint (default: all count the same)",
    )
    parser.add_argument("--last", type=positive, metavar="N", help="the N newest good checkpoints of one run")
    add_json_argument(parser)
    return parser


def decay(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return number


def newest_of(run: Path, count: int) -> list[Path]:
    """The `count` newest good checkpoints of a run."""
    root = run if run.name == CHECKPOINTS else run / CHECKPOINTS
    good = []
    for folder in complete_checkpoints(root):
        if reason := reservation(folder):
            log.warning("%s skipped: %s", folder, reason)
        else:
            good.append(folder)
    if len(good) < count:
        raise UserError(f"{root}: {len(good)} good checkpoints, fewer than --last {count}")
    return good[:count]


def run(args: argparse.Namespace) -> int:
    if args.last and len(args.checkpoints) > 1:
        raise UserError("--last N takes one run's folder, not several checkpoints")
    if args.last:
        checkpoints = newest_of(args.checkpoints[0], args.last)
    else:
        checkpoints = [resolve(path) for path in args.checkpoints]
    log.info("loading torch")
    from megadyn.checkpoint.averaging import average  # seconds of imports, which help and mistakes do without

    result = average(checkpoints, args.output, args.ema)
    print(
        f"{len(result['averaged'])} checkpoints -> {args.output}: iteration {result['iteration']}, "
        f"{result['parameters']:,} parameters"
    )
    if args.json:
        print(json.dumps(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))
