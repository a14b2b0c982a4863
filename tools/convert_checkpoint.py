"""A run's checkpoint: merged into a Hugging Face folder, or described.

    python tools/convert_checkpoint.py to-hf --checkpoint runs/quickstart --output hf
    python tools/convert_checkpoint.py inspect --checkpoint runs/quickstart

`--checkpoint` is a checkpoint's folder, or a run's output folder for its newest. The export holds sharded
safetensors, config.json, the tokenizer and the stand-alone modelling files; it loads with megadyn uninstalled.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megadyn.arguments import byte_count
from megadyn.checkpoint.export import SHARD_BYTES, export
from megadyn.checkpoint.layout import damage, read_manifest, resolve
from megadyn.errors import Parser, UserError, run_tool
from megadyn.parallel.precision import PRECISIONS
from megadyn.paths import expanded, user_path


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="export to Hugging Face")
    inspect = commands.add_parser(
        "inspect", help="iteration, topology, size, and whether all files are whole"
    )
    for command in (to_hf, inspect):
        command.add_argument("--checkpoint", type=user_path, required=True)
        command.add_argument(
            "--json", action="store_true", help="print the result as one JSON object on the last line"
        )
    to_hf.add_argument("--output", type=user_path, required=True)
    to_hf.add_argument(
        "--as",
        dest="style",
        choices=("megadyn", "qwen2"),
        default="megadyn",
        help="qwen2: a dense model as plain Qwen2ForCausalLM",
    )
    to_hf.add_argument("--precision", choices=tuple(PRECISIONS), help="of the weights (default: the run's)")
    to_hf.add_argument(
        "--max-shard-size",
        type=byte_count,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="of a weight file, such as 2GB (default: 5GB); a tensor is never cut",
    )
    to_hf.add_argument(
        "--tokenizer",
        type=expanded,
        help="the run's tokenizer, where its configured path does not lead to it from here",
    )
    to_hf.add_argument("--overwrite", action="store_true")
    return parser.parse_args(argv)


def describe(checkpoint: Path) -> dict[str, object]:
    manifest = read_manifest(checkpoint)
    return {key: manifest[key] for key in ("iteration", "consumed_samples", "topology")} | {
        "kind": manifest["model"]["routing"]["kind"],
        "files": len(manifest["files"]),
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "damage": damage(checkpoint, sorted(manifest["files"])),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    checkpoint = resolve(args.checkpoint)
    if args.command == "inspect":
        result = describe(checkpoint)
        if result["damage"]:
            raise UserError(str(result["damage"]))
        print(
            f"{checkpoint}: iteration {result['iteration']}, {result['kind']}, {result['files']} files, all whole"
        )
    else:
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
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
