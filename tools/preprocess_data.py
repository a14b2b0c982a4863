"""Turn text into a dataset of tokens in Megatron-LM's indexed format.

    python tools/preprocess_data.py --input corpus/ --tokenizer tokenizer/ --output-prefix data/corpus --append-eod

Writes data/corpus.bin, data/corpus.idx and data/corpus.json; none of the names exists until all are complete.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from megadyn.data.arguments import add_corpus_arguments, add_output_arguments, corpus_of, positive
from megadyn.data.preprocess import preprocess
from megadyn.errors import Parser, run_tool


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR|FILE.model|byte",
                        help="folder with tokenizer.json, SentencePiece model, or the word byte")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="tokenizer processes (default: 1)")
    add_output_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    corpus = corpus_of(args)
    began = time.perf_counter()
    record = preprocess(corpus, args.tokenizer, args.output_prefix, append_eod=args.append_eod, workers=args.workers,
                        overwrite=args.overwrite)
    seconds = time.perf_counter() - began
    print(f"{record.documents:,} documents, {record.tokens:,} tokens in {seconds:.1f} s -> {args.output_prefix}.bin, .idx, .json")
    if corpus.skipped:
        print(f"{corpus.skipped:,} documents skipped, the first: {corpus.first_skipped}")
    if args.json:
        print(json.dumps(asdict(record) | {"seconds": round(seconds, 3)}))


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
