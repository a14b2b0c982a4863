"""Command-line arguments that several data tools share."""

import argparse
from pathlib import Path

from megadyn.data.readers import FORMATS, Corpus


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="PATH",
                        help="text, JSONL or Parquet files, plain, .gz or .zst; folders or patterns of them")
    parser.add_argument("--format", choices=FORMATS, default="auto",
                        help="auto: .jsonl and .json are JSONL, .parquet is Parquet, all else is text (default)")
    parser.add_argument("--text-key", default="text",
                        help="key of the text in a JSONL line, or its column in Parquet (default: text)")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail",
                        help="a document that cannot be read ends the job (default) or is counted and left out")


def corpus_of(args: argparse.Namespace) -> Corpus:
    return Corpus(args.input, form=args.format, text_key=args.text_key, on_error=args.on_error)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object in the last line")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def above_zero(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return number
