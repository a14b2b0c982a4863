"""Show what is in an indexed dataset, and check that it is intact.

    megadyn inspect data/corpus --documents 2 --tokenizer tokenizer/ --verify

Opening it checks the index: offsets, lengths, document boundaries and the sizes of both files. --verify also reads
every token, and checks ids against the vocabulary and the token stream against the hash in data/corpus.json.
"""

import argparse
import json
from collections.abc import Sequence

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.data.indexed import IndexedDataset, check_tokenizer
from megadyn.data.inspection import length_histogram, verify
from megadyn.data.samples import SampleSet
from megadyn.errors import Parser, UserError
from megadyn.log import log
from megadyn.paths import expanded, user_path
from megadyn.tokenization.tokenizer import TokenArray, Tokenizer, load_tokenizer

SHOWN_TOKENS = 200


def make_parser() -> Parser:
    parser = command_parser("inspect", __doc__)
    parser.add_argument("prefix", type=user_path, metavar="PREFIX")
    parser.add_argument(
        "--documents",
        type=int,
        default=0,
        metavar="N",
        help=f"show N documents, {SHOWN_TOKENS} tokens of each",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help=f"show N samples as cut for training, but not shuffled, {SHOWN_TOKENS} tokens of each",
    )
    parser.add_argument(
        "--sequence-length",
        type=positive,
        default=1024,
        metavar="T",
        help="length of the samples (default: 1024)",
    )
    parser.add_argument(
        "--tokenizer",
        type=expanded,
        metavar="DIR|FILE.model|ORG/NAME|byte",
        help="decode the tokens; must be the tokenizer that made the dataset",
    )
    parser.add_argument("--verify", action="store_true", help="read and check every token")
    add_json_argument(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    dataset = IndexedDataset(args.prefix)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer:
        check_tokenizer(dataset, tokenizer)
    lengths = length_histogram(dataset.sizes)
    result = {
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "dtype": str(dataset.dtype),
        "lengths": lengths,
    }
    print(
        f"{dataset.num_documents:,} documents, {len(dataset):,} sequences, {dataset.num_tokens:,} tokens ({dataset.dtype})"
    )
    print("sequences by length: " + ", ".join(f"{span}: {count:,}" for span, count in lengths.items()))
    if dataset.record:
        result |= {
            "tokenizer": dataset.record.tokenizer,
            "vocab_size": dataset.record.vocab_size,
            "sha256": dataset.record.sha256,
            "skipped": dataset.record.skipped,
        }
        ends = (
            f"end with id {dataset.record.eod}"
            if dataset.record.append_eod
            else "have no end-of-document token"
        )
        print(
            f"made with tokenizer {dataset.record.tokenizer} ({dataset.record.vocab_size:,} ids); documents {ends}"
        )
    if args.verify:
        log.info("reading all tokens")
        made_with = dataset.record or tokenizer
        found = verify(dataset, made_with.vocab_size if made_with else None)
        result |= {
            "verified": True,
            "sha256": found.sha256,
            "smallest_id": found.smallest_id,
            "largest_id": found.largest_id,
        }
        print(f"verified: ids {found.smallest_id} to {found.largest_id}, sha256 {found.sha256}")
    for k in range(min(args.documents, dataset.num_documents)):
        show(f"document {k}", dataset.document(k), tokenizer)
    if args.samples > 0:
        samples = SampleSet(dataset, sequence_length=args.sequence_length, seed=0, shuffle=False)
        for k in range(min(args.samples, len(samples))):
            show(f"sample {k}", samples[k], tokenizer)
    if args.json:
        print(json.dumps(result))


def show(what: str, tokens: TokenArray, tokenizer: Tokenizer | None) -> None:
    ids = tokens[:SHOWN_TOKENS].tolist()
    print(
        f"--- {what}: {len(tokens):,} tokens"
        + (f", the first {SHOWN_TOKENS}" if len(tokens) > SHOWN_TOKENS else "")
    )
    if tokenizer and max(ids, default=0) >= tokenizer.vocab_size:
        raise UserError(
            f"{what} holds token id {max(ids)}, but tokenizer {tokenizer.name} has only {tokenizer.vocab_size} ids"
        )
    print(tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids)))
