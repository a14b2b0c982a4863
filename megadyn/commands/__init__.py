"""The command `megadyn`: one module per sub-command, imported on demand.

So `megadyn --help` needs neither torch nor any other large package.
"""

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module

import megadyn
from megadyn.errors import UserError, did_you_mean, run_tool
from megadyn.log import start_logging

COMMANDS = {
    "new": "copy an example's configuration and run script into this folder",
    "tokenizer": "train a byte-level BPE tokenizer on text",
    "preprocess": "turn text into an indexed dataset of tokens",
    "inspect": "show what is in a dataset, and check that it is intact",
    "merge": "copy several datasets into one",
    "config": "list all keys, write a schema for editors, show a resolved file",
    "plan": "list layouts over GPUs with predicted memory and speed",
    "check": "check whether a run can start",
    "train": "train, or resume training",
    "checkpoint": "describe a checkpoint and verify its files",
    "average": "average the weights of checkpoints into another one",
    "evaluate": "loss, perplexity and bits per byte on a dataset",
    "export": "write a checkpoint as a Hugging Face folder",
    "generate": "continue a prompt with an exported model",
    "report": "write one HTML page about a run",
    "benchmark": "measure speed and memory of parts of megadyn",
    "completion": "print a script that completes these commands in a shell",
}
"""Name -> what it does. Each is a module of this package with `make_parser` and `main`."""


def overview() -> str:
    width = max(map(len, COMMANDS))
    columns = shutil.get_terminal_size().columns

    def entry(name: str, text: str) -> str:
        return textwrap.fill(
            text, columns, initial_indent=f"  {name:{width}}  ", subsequent_indent=" " * (width + 4)
        )

    return "\n".join(
        [
            "usage: megadyn COMMAND ...",
            "",
            textwrap.fill(
                "Pretraining of routed transformers: text to a dataset, to a trained model, to a Hugging Face folder.",
                columns,
            ),
            "",
            "commands:",
            *(entry(name, text) for name, text in COMMANDS.items()),
            "",
            "options:",
            entry("-h, --help", "show this text; `megadyn COMMAND --help` shows a command's own"),
            entry("--version", "show the version"),
            "",
            "example:",
            "    megadyn new quickstart",
        ]
    )


def dispatch(words: Sequence[str]) -> int:
    """Runs `megadyn WORDS` and returns its exit status. Raises UserError for an unknown command."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"megadyn {megadyn.__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"{name!r}: no such command{did_you_mean(name, COMMANDS)}; `megadyn --help` lists them"
        )
    status: int | None = import_module(f"{__name__}.{name}").main(rest)
    return status or 0


def run_command(main: Callable[[], int | None]) -> int:
    """`run_tool`, with a log that says on standard error what is being done; results alone go to standard output."""
    start_logging(stream="stderr")
    return run_tool(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command."""
    return run_command(lambda: dispatch(sys.argv[1:] if argv is None else argv))
