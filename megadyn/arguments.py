"""Command-line arguments and parsers shared by the commands."""

import argparse
import re
import shutil
import sys
import textwrap
from pathlib import Path

from megadyn.errors import Parser
from megadyn.paths import user_path

NARROW = 80
"""Columns of a terminal that leave no room for a wide column of options."""


def command_parser(name: str, doc: str | None) -> Parser:
    """The parser of `megadyn NAME`, or of the script in `tools/` that was started: its help shows what the user typed.

    Args:
        name: the sub-command, possibly with a second word that selects a part of it.
        doc: paragraphs of text, and one paragraph of example commands, which is moved to the end of the help.
    """
    script = Path(sys.argv[0])
    prog = started = f"megadyn {name}"
    if script.parent.name == "tools" and script.suffix == ".py":
        prog = " ".join([script.name, *name.split()[1:]])  # for `benchmark`, including what it measures
        started = f"python tools/{prog}"
    paragraphs = (doc or "").strip().split("\n\n")
    examples = [
        text
        for text in paragraphs
        if all(re.match(r"\s*(megadyn|mpirun) ", line) for line in text.splitlines())
    ]
    commands = [
        line.strip().replace(f"megadyn {name}", started) for text in examples for line in text.splitlines()
    ]
    return Parser(
        prog=prog,
        description="\n\n".join(text for text in paragraphs if text not in examples),
        epilog="\n    ".join(["examples:" if len(commands) > 1 else "example:", *commands]),
        formatter_class=HelpText,
    )


class HelpText(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written, but for paragraphs too wide for the terminal; names of options and what they mean on one
    line where both fit."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, max_help_position=32 if columns >= NARROW else 20)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = super()._fill_text(text, width, indent).split("\n\n")
        return "\n\n".join(narrowed(paragraph, width) for paragraph in paragraphs)


def narrowed(paragraph: str, width: int) -> str:
    """A paragraph in lines of `width` where one is longer; commands and lists, which are indented, stay as they are."""
    lines = paragraph.splitlines()
    if all(len(line) <= width for line in lines) or any(line.startswith(" ") for line in lines):
        return paragraph
    return textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)


def add_config_arguments(parser: argparse.ArgumentParser, example: str = "training.iterations=20") -> None:
    """Adds CONFIG and its overrides; `example` is an override shown in the help."""
    parser.add_argument("config", type=user_path, metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"for example {example}; `megadyn config keys` lists the keys",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object in the last line"
    )


LARGEST = 2**63 - 1


def positive(text: str) -> int:
    if not 1 <= (number := int(text)) <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text}: must be at least 1{' and below 2^63' if number > 1 else ''}"
        )
    return number


def count(text: str) -> int:
    """A number that may be 0."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def seed(text: str) -> int:
    if not 0 <= (number := int(text)) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and below 2^63")
    return number


def output_prefix(text: str) -> Path:
    """A path that ends in a name; otherwise the output files would be hidden files."""
    if not (path := user_path(text)).name or path.name == "..":
        raise argparse.ArgumentTypeError(f"{text!r}: must end in a name, as data/corpus does")
    return path


UNITS = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def byte_count(text: str) -> int:
    """A number of bytes, possibly with a unit: 5GB (10^9), 512MiB (2^20)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text)
    count = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a number of bytes above 0, such as 5GB or 512MiB"
        )
    return count


def above_zero(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return number
