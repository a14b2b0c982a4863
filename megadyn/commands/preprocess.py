"""Turn text into a dataset of tokens in Megatron-LM's indexed format.

    megadyn preprocess --input corpus/ --tokenizer tokenizer/ --output-prefix data/corpus --append-eod
    mpirun -n 64 megadyn preprocess ...       # the same, spread over nodes with a shared file system

Writes data/corpus.bin, data/corpus.idx and data/corpus.json, which appear only when all are complete. Until then,
finished parts are kept in data/corpus.parts: after an interruption, repeat the command and it continues from there.
"""

import argparse
import gc
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict

from megadyn.arguments import add_output_arguments, command_parser, output_prefix, positive, seed
from megadyn.errors import Parser, UserError, line_lost, run_tool
from megadyn.log import log, start_logging
from megadyn.paths import expanded
from megadyn.prepare.arguments import add_corpus_arguments, corpus_of
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.ranks import Ranks, ranks_of_job
from megadyn.tokenization.gigatoken import ENGINES

GARBAGE_THRESHOLD = 100_000
"""Number of new objects before Python runs its garbage collector: importing modules and tokenizers creates many, and no
garbage."""


def make_parser() -> Parser:
    parser = command_parser("preprocess", __doc__)
    add_corpus_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=expanded,
        required=True,
        metavar="DIR|FILE.model|ORG/NAME|byte",
        help="folder with tokenizer.json, SentencePiece model, a repository on the Hugging Face hub, or the word byte",
    )
    parser.add_argument("--output-prefix", type=output_prefix, required=True, metavar="PREFIX")
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    parser.add_argument(
        "--eod",
        metavar="TOKEN",
        help="with --append-eod: the token, spelled as in the vocabulary (default: the tokenizer's eos_token)",
    )
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes on each rank (default: 1)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="auto: gigatoken if it gives the same ids as the reference tokenizer (default)",
    )
    parser.add_argument("--max-documents", type=positive, metavar="N", help="take the first N documents")
    parser.add_argument(
        "--shuffle-documents", action="store_true", help="write the documents in a random order"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the random order (default: 0)")
    add_output_arguments(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    if args.eod is not None and not args.append_eod:
        raise UserError("--eod names the token that --append-eod adds: give --append-eod, too")
    return args


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.rank == 0:
        start_logging(raises=line_lost)
    else:
        log.setLevel(logging.WARNING)
    log.info("looking at the input and the tokenizer")
    corpus = corpus_of(args, is_listed=ranks.rank == 0)
    began = time.perf_counter()
    record = preprocess(
        corpus,
        args.tokenizer,
        args.output_prefix,
        append_eod=args.append_eod,
        workers=args.workers,
        overwrite=args.overwrite,
        engine=args.engine,
        max_documents=args.max_documents,
        shuffle_seed=args.seed if args.shuffle_documents else None,
        ranks=ranks,
        eod=args.eod,
    )
    seconds = time.perf_counter() - began
    if ranks.rank != 0:
        return
    text_bytes = record.text_bytes or 0
    tokens_per_byte = record.tokens / max(1, text_bytes)  # some tokenizers give tokens for an empty text
    print(
        f"{record.documents:,} documents, {record.tokens:,} tokens in {seconds:.1f} s -> {args.output_prefix}.bin, .idx, .json"
    )
    print(
        f"{text_bytes:,} bytes of text, {tokens_per_byte:.4f} tokens per byte, {text_bytes / seconds / 1e6:.1f} MB/s"
    )
    print(
        f"{record.skipped:,} documents skipped{f', the first: {corpus.first_skipped}' if record.skipped else ''}"
    )
    print(f"sha256 of the tokens: {record.sha256}")
    if args.json:
        print(json.dumps(asdict(record) | {"tokens_per_byte": tokens_per_byte, "seconds": round(seconds, 3)}))


def interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    gc.set_threshold(GARBAGE_THRESHOLD)
    ranks = Ranks()
    signal.signal(signal.SIGTERM, interrupted)

    def job() -> None:
        nonlocal ranks
        ranks = ranks_of_job()
        run(parse_args(argv), ranks)

    try:
        status = run_tool(job)
    except KeyboardInterrupt:
        if ranks.size == 1:  # otherwise the launcher stopped this rank, and reports why
            print("error: interrupted; the same command continues from what is finished", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        ranks.abort(status)  # other ranks may be waiting for this one
    if ranks.size == 1:
        os._exit(status)  # skips Python's slow cleanup of all modules and tokenizers
    return status
