"""Loss of a run's checkpoint, or of an exported model, on an indexed dataset.

    python tools/evaluate.py --checkpoint runs/quickstart --data runs/quickstart/data/validation
    python tools/evaluate.py --checkpoint runs/quickstart/hf --data runs/quickstart/data/validation --routing causal
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from megadyn.data.arguments import add_json_argument, positive
from megadyn.errors import Parser, run_tool
from megadyn.training.evaluate import evaluate


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, a run's folder, or a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, metavar="PREFIX")
    parser.add_argument("--routing", choices=("topk", "causal", "both"), default="both")
    parser.add_argument("--samples", type=positive, help="use only the first so many samples (default: all)")
    parser.add_argument("--sequence-length", type=positive, help="default: the run's, or the model's longest")
    parser.add_argument("--batch-size", type=positive, default=8)
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    modes = ("topk", "causal") if args.routing == "both" else (args.routing,)
    result = evaluate(args.checkpoint, args.data, modes=modes, samples=args.samples, batch_size=args.batch_size,
                      sequence_length=args.sequence_length)
    for mode in modes:
        print(f"{mode:>7}: loss {result[mode]:.4f}, perplexity {math.exp(min(result[mode], 700)):,.2f}")
    if "causal_agreement" in result:
        print(f"routed {result['routed_fraction']:.1%} of tokens ({modes[-1]}); "
              f"the causal rule agrees with top-k on {result['causal_agreement']:.1%}")
    print(f"{result['tokens']:,} tokens")
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
