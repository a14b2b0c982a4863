"""List the keys of a configuration, write a schema for editors, or show a file with everything that it extends and all defaults.

megadyn config keys training
megadyn config schema > megadyn.schema.json
megadyn config show config.yaml parallel.tensor=2
"""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from omegaconf import OmegaConf

from megadyn.arguments import add_config_arguments, add_json_argument, command_parser
from megadyn.config import load_config, resolved_config
from megadyn.config.describe import REQUIRED, ROUTING, Key, keys, schema
from megadyn.errors import Parser

WIDTH = 110


def make_parser() -> Parser:
    parser = command_parser("config", __doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="{keys,schema,show}")
    listed = commands.add_parser("keys", help="every key with its type, default and text")
    listed.add_argument("section", nargs="?", default="", metavar="SECTION", help="only this section or key")
    add_json_argument(listed)
    commands.add_parser("schema", help="JSON Schema of a configuration file, on standard output")
    shown = commands.add_parser("show", help="the resolved configuration as YAML")
    add_config_arguments(shown)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.what == "keys":
        found = keys(args.section)
        print(listing(found))
        if args.json:
            print(json.dumps([record(key) for key in found]))
    elif args.what == "schema":
        print(json.dumps(schema(), indent=2))
    else:
        resolved = resolved_config(load_config(args.config, args.overrides))
        print(OmegaConf.to_yaml(OmegaConf.create(resolved)), end="")
    return 0


def record(key: Key) -> dict[str, Any]:
    return {
        "name": key.name,
        "type": key.type,
        "default": None if key.default == REQUIRED else key.default,
        "required": key.default == REQUIRED,
        "kind": key.kind,
        "text": key.text,
    }


def listing(found: Sequence[Key]) -> str:
    """One paragraph per key; the keys of each kind of routing under the kind's name."""
    width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
    lines: list[str] = []
    for kind, some in groupby(found, lambda key: key.kind):
        if kind:
            lines.append(f"---- {ROUTING} of kind {kind}\n")
        for key in some:
            default = "required" if key.default == REQUIRED else f"default {json.dumps(key.default)}"
            lines.append(f"{key.name}  ({key.type}, {default})")
            lines.append(
                textwrap.fill(key.text, width, initial_indent="    ", subsequent_indent="    ") + "\n"
            )
    return "\n".join(lines).rstrip("\n")
