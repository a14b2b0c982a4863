"""Print a script that completes megadyn's commands, options and file names in a shell.

megadyn completion bash > ~/.local/share/bash-completion/completions/megadyn
megadyn completion zsh > "${fpath[1]}/_megadyn"
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import shtab

from megadyn.arguments import command_parser, output_prefix
from megadyn.commands import COMMANDS
from megadyn.errors import Parser
from megadyn.log import log
from megadyn.paths import expanded, user_path

SHELLS = ("bash", "zsh")
PATHS = (user_path, expanded, output_prefix)
"""Argument types that are paths."""


def make_parser() -> Parser:
    parser = command_parser("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """One parser with all commands. Their modules are imported, which takes a second or two."""

    def of_command(prog: str, **_: object) -> Any:
        return importlib.import_module(f"megadyn.commands.{prog.split()[-1]}").make_parser()

    parser = argparse.ArgumentParser(prog="megadyn")
    parser.add_argument("--version", action="store_true")
    made: Any = of_command  # the type stubs require a class, but argparse only calls it
    commands = parser.add_subparsers(parser_class=made)
    for name, text in COMMANDS.items():
        complete_paths(commands.add_parser(name, help=text))
    return parser


def complete_paths(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:  # argparse has no public list of actions; shtab reads this one too
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                complete_paths(inner)
        elif action.type in PATHS:
            # shtab reads this attribute, which argparse's own type lacks.
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log.info("reading the options of all commands")
    print(shtab.complete(whole_parser(), args.shell))
    return 0
