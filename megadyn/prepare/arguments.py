"""Command-line arguments that name a corpus."""

import argparse
from pathlib import Path

from megadyn.paths import user_path
from megadyn.prepare.readers import FORMATS, Corpus
from megadyn.prepare.remote import is_address


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=path_or_address,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text, JSONL, Parquet or Arrow files, also compressed; folders or patterns of them; also at addresses "
        "(https://, s3://, gs://, hf://datasets/ORG/NAME/)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="auto: by content and name; a file of an unknown format is refused (default)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        help="key of the text in a JSONL line, or its column in Parquet (default: text)",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what to do with a document that cannot be read: fail (default), or skip and count it",
    )


def path_or_address(text: str) -> Path | str:
    return text if is_address(text) else user_path(text)


def corpus_of(args: argparse.Namespace, is_listed: bool = True) -> Corpus:
    """`is_listed`: whether this process needs to know the files; otherwise it reads what another one tells it to."""
    return Corpus(
        args.input if is_listed else (), form=args.format, text_key=args.text_key, on_error=args.on_error
    )
