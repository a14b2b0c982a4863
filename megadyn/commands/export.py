"""Merge a run's checkpoint into a Hugging Face folder.

Give a checkpoint's folder, or a run's output folder for its newest checkpoint. The export contains sharded safetensors,
config.json, the tokenizer and the stand-alone model code; it loads without megadyn.

    megadyn export --checkpoint runs/quickstart --output hf
"""

import argparse
import json
from collections.abc import Sequence

from megadyn.arguments import add_output_arguments, byte_count, command_parser
from megadyn.checkpoint.layout import resolve
from megadyn.config import load_config
from megadyn.config.config_map import DENSE_TYPES
from megadyn.config.run import PRECISIONS
from megadyn.errors import Parser, UserError
from megadyn.log import log
from megadyn.paths import expanded, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=user_path, required=True, metavar="DIR")
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR")
    parser.add_argument(
        "--as",
        dest="style",
        choices=("megadyn", *DENSE_TYPES),
        default="megadyn",
        help="a dense model as an architecture of transformers: qwen2 as plain Qwen2ForCausalLM, and so on",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights (default: the run's)")
    parser.add_argument(
        "--max-shard-size",
        type=byte_count,
        default="5GB",
        metavar="SIZE",
        help="size of a weight file, such as 2GB (default: 5GB); tensors are never split",
    )
    parser.add_argument(
        "--tokenizer",
        type=expanded,
        help="the run's tokenizer, if its configured path does not exist here",
    )
    parser.add_argument(
        "--no-mirror",
        action="store_true",
        help="do not copy the export to the run's checkpoint.mirror, if it has one",
    )
    add_output_arguments(parser)


def make_parser() -> Parser:
    parser = command_parser("export", __doc__)
    add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    checkpoint = resolve(args.checkpoint)
    log.info("loading torch")
    from megadyn.checkpoint.export import export  # seconds of imports, which help and mistakes do without

    result = export(
        checkpoint,
        args.output,
        style=args.style,
        precision=args.precision,
        shard_bytes=args.max_shard_size,
        tokenizer=args.tokenizer,
        overwrite=args.overwrite,
    )
    print(
        f"{checkpoint} -> {args.output}: {result['parameters']:,} parameters in {result['precision']}, "
        f"{result['shards']} file(s)"
    )
    if not args.no_mirror and (mirror := load_config(checkpoint / "config.yaml").checkpoint.mirror):
        from megadyn.checkpoint.mirror import copy_export

        log.info("copying the export to the run's mirror")
        try:
            result["mirror"] = copy_export(args.output, mirror)
        except UserError as error:
            raise UserError(
                f"{args.output} is complete, but not copied to checkpoint.mirror: {error}"
            ) from None
        print(f"{args.output} -> {result['mirror']}")
    if args.json:
        print(json.dumps(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))
