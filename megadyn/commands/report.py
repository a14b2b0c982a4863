"""One page on a run: losses, speed, routing by layer, a text coloured by routing, configuration, checkpoints.

    megadyn report runs/quickstart --output report.html
    megadyn report runs/mod --compare runs/dtf --output report.html

The page is one HTML file that works offline; it replaces an existing one. The run may still be going.
"""

import argparse
import json
from collections.abc import Sequence

from megadyn.arguments import add_json_argument, command_parser
from megadyn.errors import Parser
from megadyn.paths import user_path
from megadyn.report.report import write_report


def make_parser() -> Parser:
    parser = command_parser("report", __doc__)
    parser.add_argument("run", type=user_path, metavar="RUN_DIR", help="a run's output folder")
    parser.add_argument("--output", type=user_path, required=True, metavar="FILE.html")
    parser.add_argument(
        "--compare",
        type=user_path,
        metavar="OTHER_RUN",
        help="draw this run's curves together with the first run's",
    )
    parser.add_argument(
        "--tokens",
        type=count,
        default=300,
        metavar="N",
        help="tokens of a validation text to run through the newest intact checkpoint on the CPU; 0: none (default: 300)",
    )
    parser.add_argument(
        "--no-checkpoints",
        action="store_true",
        help="do not read the checkpoints, which takes long if they are large; this also leaves out the text",
    )
    add_json_argument(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    folders = [args.run] + ([args.compare] if args.compare else [])
    result = write_report(
        folders, args.output, tokens=args.tokens, look_at_checkpoints=not args.no_checkpoints
    )
    for run in result["runs"]:
        print(f"{run['folder']}: {run['training_records']:,} records to iteration {run['iteration']:,}")
        for note in run["notes"] + ([f"no text: {run['no_text']}"] if run["no_text"] else []):
            print(f"  {note}")
    print(f"{args.output}: {result['bytes']:,} bytes")
    if args.json:
        print(json.dumps(result))
    return 0
