"""Describe a checkpoint, and verify that all of its files are intact.

megadyn checkpoint runs/quickstart
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megadyn.arguments import add_json_argument, command_parser
from megadyn.checkpoint.layout import damage, read_manifest, resolve
from megadyn.errors import Parser, UserError
from megadyn.log import log
from megadyn.paths import user_path


def make_parser() -> Parser:
    parser = command_parser("checkpoint", __doc__)
    parser.add_argument(
        "checkpoint",
        type=user_path,
        metavar="DIR",
        help="a checkpoint's folder, or a run's output folder for its newest checkpoint",
    )
    add_json_argument(parser)
    return parser


def describe(checkpoint: Path) -> dict[str, object]:
    manifest = read_manifest(checkpoint)
    return {key: manifest[key] for key in ("iteration", "consumed_samples", "topology")} | {
        "kind": manifest["model"]["routing"]["kind"],
        "files": len(manifest["files"]),
        "averaged": len(manifest.get("averaged", {"of": []})["of"]),
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "damage": damage(checkpoint, sorted(manifest["files"])),
    }


def run(args: argparse.Namespace) -> int:
    checkpoint = resolve(args.checkpoint)
    log.info("verifying %s", checkpoint)
    result = describe(checkpoint)
    if result["damage"]:
        raise UserError(str(result["damage"]))
    averaged = f"average of {result['averaged']} checkpoints, " if result["averaged"] else ""
    print(
        f"{checkpoint}: iteration {result['iteration']}, {result['kind']}, {averaged}{result['files']} files, all intact"
    )
    if args.json:
        print(json.dumps(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(make_parser().parse_args(argv))
