"""Copy several indexed datasets into one.

    python tools/merge_datasets.py --inputs data/a data/b --output-prefix data/all

The result is what preprocessing the inputs of all of them at once gives, byte for byte.
"""

import argparse
import json

from megadyn.arguments import add_output_arguments, output_prefix
from megadyn.errors import Parser, run_tool
from megadyn.paths import user_path
from megadyn.prepare.merge import merge_datasets


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=user_path, nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--output-prefix", type=output_prefix, required=True, metavar="PREFIX")
    add_output_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
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


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
