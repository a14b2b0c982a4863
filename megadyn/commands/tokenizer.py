"""Train a byte-level BPE tokenizer on text.

    megadyn tokenizer --input corpus/ more.jsonl --vocab-size 16000 --output tokenizer/

Writes a folder that `transformers.AutoTokenizer` can load. The folder appears only when complete.
"""

import argparse
import json
from collections.abc import Iterator, Sequence

from megadyn.arguments import add_output_arguments, command_parser
from megadyn.errors import Parser
from megadyn.log import log
from megadyn.paths import user_path
from megadyn.prepare.arguments import add_corpus_arguments, corpus_of
from megadyn.prepare.readers import Corpus
from megadyn.prepare.train_tokenizer import train_tokenizer
from megadyn.progress import BYTES, Bar, waiting


def make_parser() -> Parser:
    parser = command_parser("tokenizer", __doc__)
    add_corpus_arguments(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR")
    add_output_arguments(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def told(corpus: Corpus, bar: Bar) -> Iterator[str]:
    """The documents; says how far their reading is, and what follows."""
    log.info("reading %.1f MB and counting words", bar.total / 1e6)
    for text in corpus:
        yield text
        bar.reach(corpus.consumed)
    bar.close()
    log.info("merging the most frequent pairs")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    corpus = corpus_of(args)
    log.info("looking at the input")
    with Bar("reading", corpus.size(), BYTES) as bar, waiting("training the tokenizer"):
        documents = told(corpus, bar)
        tokenizer = train_tokenizer(documents, args.vocab_size, args.output, overwrite=args.overwrite)
    print(f"{tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]} -> {args.output}")
    if tokenizer.vocab_size < args.vocab_size:
        print(f"fewer than the requested {args.vocab_size:,}: the corpus has no more pairs to merge")
    if corpus.skipped:
        print(f"{corpus.skipped:,} documents skipped, the first: {corpus.first_skipped}")
    if args.json:
        print(
            json.dumps(
                {
                    "output": str(args.output),
                    "vocab_size": tokenizer.vocab_size,
                    "eod": tokenizer.eod,
                    "fingerprint": tokenizer.fingerprint,
                    "skipped": corpus.skipped,
                }
            )
        )
