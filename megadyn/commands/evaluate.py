"""Loss, perplexity and bits per byte of a run's checkpoint, or of an exported model, on an indexed dataset.

    megadyn evaluate --checkpoint runs/quickstart --data runs/quickstart/data/validation
    megadyn evaluate --checkpoint runs/quickstart/hf --data runs/quickstart/data/validation --routing causal

The checkpoint may come from any number of ranks. Loss is the mean over predicted tokens in nats; perplexity is its
exponential. Bits per byte are loss / ln 2, times tokens per byte of text in the whole dataset, as recorded in
PREFIX.json. With --json the last line is one object: `topk`, `causal` (losses), `tokens`, `perplexity` and
`bits_per_byte` by routing (null if the dataset does not record its bytes), and for a routed model `routed_fraction`,
`causal_agreement`. NaN and infinity become null.
"""

import argparse
import json
from collections.abc import Sequence

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.errors import Parser
from megadyn.log import log
from megadyn.paths import user_path
from megadyn.telemetry.sinks import finite


def make_parser() -> Parser:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        required=True,
        help="a checkpoint, a run's folder, or a Hugging Face folder",
    )
    parser.add_argument("--data", type=user_path, required=True, metavar="PREFIX")
    parser.add_argument("--routing", choices=("topk", "causal", "both"), default="both")
    parser.add_argument("--samples", type=positive, help="use only this many samples (default: all)")
    parser.add_argument("--sequence-length", type=positive, help="default: the run's, or the model's longest")
    parser.add_argument("--batch-size", type=positive, default=8)
    add_json_argument(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    modes = ("topk", "causal") if args.routing == "both" else (args.routing,)
    log.info("loading torch")
    from megadyn.evaluation.losses import evaluate  # seconds of imports, which help and mistakes do without

    result = evaluate(
        args.checkpoint,
        args.data,
        modes=modes,
        samples=args.samples,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
    )
    bits = result["bits_per_byte"]
    for mode in modes:
        per_byte = f", {bits[mode]:.4f} bits per byte" if bits else ""
        print(f"{mode:>7}: loss {result[mode]:.4f}, perplexity {result['perplexity'][mode]:,.2f}{per_byte}")
    if not bits:
        print(
            f"bits per byte: unknown, because nothing records how many bytes of text dataset {args.data} was made of"
        )
    if "causal_agreement" in result:
        print(
            f"routed {result['routed_fraction']:.1%} of tokens ({modes[-1]}); "
            f"the causal rule agrees with top-k on {result['causal_agreement']:.1%}"
        )
    print(f"{result['tokens']:,} tokens")
    if args.json:
        print(json.dumps(finite(result), allow_nan=False))
    return 0
