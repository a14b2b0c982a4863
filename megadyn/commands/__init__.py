"""The command `megadyn`: one module per sub-command, imported on demand.

So `megadyn --help` needs neither torch nor any other large package.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

import megadyn
from megadyn.errors import UserError, did_you_mean, run_tool

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
    return "\n".join(
        [
            "usage: megadyn COMMAND ...",
            "",
            "Pretraining of routed transformers: text to a dataset, to a trained model, to a Hugging Face folder.",
            "",
            "commands:",
            *(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()),
            "",
            "options:",
            f"  {'-h, --help':{width}}  show this text; `megadyn COMMAND --help` shows a command's own",
            f"  {'--version':{width}}  show the version",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command."""
    return run_tool(lambda: dispatch(sys.argv[1:] if argv is None else argv))
