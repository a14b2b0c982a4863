"""`megadyn export` and `megadyn checkpoint` as a script: exports a run's checkpoint to a Hugging Face folder, or describes it.

python tools/convert_checkpoint.py to-hf --checkpoint runs/quickstart --output hf
python tools/convert_checkpoint.py inspect --checkpoint runs/quickstart
"""

import argparse
from collections.abc import Sequence

from megadyn.arguments import add_json_argument
from megadyn.commands import checkpoint, export, run_command
from megadyn.errors import Parser
from megadyn.paths import user_path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export.add_arguments(commands.add_parser("to-hf", help="export to Hugging Face"))
    inspect = commands.add_parser(
        "inspect", help="iteration, topology, size, and whether all files are intact"
    )
    inspect.add_argument("--checkpoint", type=user_path, required=True, metavar="DIR")
    add_json_argument(inspect)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return (checkpoint if args.command == "inspect" else export).run(args)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
