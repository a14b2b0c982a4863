"""Bytes and operations of a training step of each kind of model. They are counted on tensors without values: no GPU is needed.

    megadyn benchmark bytes [--models dense mod:0.125 dtf:0.25] [--hidden 2048] [--sequence 4096] [--kernels torch] ...

One GPU, forward and backward, then AdamW. An operation reads each input once and writes each output once; views move nothing.
Norms and attention count as one kernel each, megadyn's Triton kernels with what they must move. `elementwise` is all that is
neither a matrix product nor attention. Products are counted with what they read and write as well. Where tokens choose for
themselves, their planned share is taken, because scores have no values.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from megadyn.arguments import add_json_argument, command_parser
from megadyn.benchmark.models import DEFAULT_MODELS, REFERENCE, add_shape_arguments, config_of, shape_line
from megadyn.benchmark.traffic import ATTENTION, ELEMENTWISE, GROUPS, PRODUCTS, OneKernelEach, Traffic
from megadyn.errors import UserError
from megadyn.kernels.rule import counting
from megadyn.kinds import known_kinds
from megadyn.model.block import LayerContext
from megadyn.network import Network
from megadyn.parallel.params import PRECISIONS, ParamMaker
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import LossScale

SHAPE = {"hidden": 2048, "layers": 36, "heads": 16, "kv_heads": 2, "ffn": 11008, "vocab": 151936}
"""Qwen2.5-3B's, as in `examples/bases`."""
ADAMW_PASSES = 7
"""It reads weights, gradients and both moments, and writes all but the gradients."""


@dataclass
class Figure:
    """One model's step. `bytes` and `flops` are of forward and backward, by group."""

    name: str
    bytes: dict[str, int]
    flops: dict[str, int]
    elementwise: int
    """Bytes of all groups but products and attention."""
    optimizer: int
    """Bytes of AdamW on weights, gradients and moments in the step's precision."""
    launches: int
    """Kernels of forward and backward."""

    @property
    def operations(self) -> int:
        return sum(self.flops.values())


def count(name: str, args: argparse.Namespace) -> Figure:
    """Raises UserError for a model that needs the values of its tensors."""
    model = config_of(name, args).model
    make = ParamMaker(Sharding(1, args.kv_heads), device="meta", dtype=PRECISIONS[args.precision])
    network = Network(LayerContext(model, make, attention="varlen"), LossScale())
    tokens = torch.zeros(args.batch, args.sequence, dtype=torch.int64, device="meta")
    traffic = Traffic(model.routing.share)
    try:
        with counting(args.kernels), traffic, OneKernelEach(traffic):
            network(tokens, tokens).backward()
    except RuntimeError as error:  # torch's for an operation that needs values, with its reason
        why = str(error).partition("\n")[0]
        raise UserError(f"--models {name}: cannot be counted on tensors without values: {why}") from error
    parameters = sum(param.numel() * param.element_size() for param in network.parameters())
    return Figure(
        name,
        {group: traffic.bytes[group] for group in GROUPS},
        {group: traffic.flops[group] for group in (PRODUCTS, ATTENTION)},
        sum(traffic.bytes[group] for group in ELEMENTWISE),
        ADAMW_PASSES * parameters,
        traffic.launches,
    )


def as_table(figures: Sequence[Figure]) -> str:
    """A column for each model; at the end its shares of the first model's operations and elementwise bytes."""
    first = figures[0]
    rows: dict[str, list[str]] = {}
    for group in (PRODUCTS, ATTENTION):
        rows[f"{group}, GFLOP"] = [shown(figure.flops[group] / 1e9) for figure in figures]
    for group in GROUPS:
        rows[f"{group}, GB"] = [shown(figure.bytes[group] / 1e9) for figure in figures]
    rows |= {
        "**elementwise, GB**": [f"**{shown(figure.elementwise / 1e9)}**" for figure in figures],
        "AdamW, GB": [shown(figure.optimizer / 1e9) for figure in figures],
        "launches": [f"{figure.launches:,}" for figure in figures],
        "operations, share": [f"{figure.operations / first.operations:.3f}" for figure in figures],
        "elementwise, share": [f"{figure.elementwise / first.elementwise:.3f}" for figure in figures],
    }
    lines = [f"| | {' | '.join(figure.name for figure in figures)} |", f"|---|{'---:|' * len(figures)}"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def shown(number: float) -> str:
    return f"{number:,.1f}" if number >= 1 or not number else f"{number:.3g}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark bytes", __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=DEFAULT_MODELS,
        metavar="KIND[:CAPACITY]",
        help="shares are relative to the first (default: %(default)s)",
    )
    add_shape_arguments(parser, **SHAPE, sequence=4096, batch=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument(
        "--kernels",
        choices=("triton", "torch"),
        default="triton",
        help="as training.kernels (default: triton)",
    )
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if REFERENCE in args.models:
        kinds = ", ".join(known_kinds())
        raise UserError(f"--models {REFERENCE}: must be KIND[:CAPACITY] with KIND one of {kinds}")
    figures = [count(name, args) for name in args.models]
    print(f"Counted, {args.precision}, kernels: {args.kernels}; {shape_line(args)}\n")
    print(as_table(figures))
    if args.json:
        print(json.dumps([asdict(figure) for figure in figures]))
