"""Copy several indexed datasets into one.

    megadyn merge --inputs data/a data/b --output-prefix data/all

The result equals, byte for byte, what preprocessing all their inputs at once gives.
"""

import argparse
import json
from collections.abc import Sequence

from megadyn.arguments import add_output_arguments, command_parser, output_prefix
from megadyn.errors import Parser
from megadyn.log import log
from megadyn.paths import user_path
from megadyn.prepare.merge import merge_datasets


def make_parser() -> Parser:
    parser = command_parser("merge", __doc__)
    parser.add_argument("--inputs", type=user_path, nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--output-prefix", type=output_prefix, required=True, metavar="PREFIX")
    add_output_arguments(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    log.info("opening %d datasets", len(args.inputs))
    merged = merge_datasets(args.inputs, args.output_prefix, overwrite=args.overwrite)
    print(
        f"{len(args.inputs)} datasets, {merged.num_documents:,} documents, {merged.num_tokens:,} tokens "
        f"-> {args.output_prefix}.bin, .idx"
    )
    if args.json:
        print(
            json.dumps(
                {
                    "documents": merged.num_documents,
                    "sequences": len(merged),
                    "tokens": merged.num_tokens,
                    "dtype": str(merged.dtype),
                    "output_prefix": str(args.output_prefix),
                }
            )
        )
