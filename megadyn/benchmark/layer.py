"""Where the time of a layer goes: forward and backward of each kind of layer and of its parts.

    megadyn benchmark layer [--models dense dtf:0.5 mod:0.125 dtrnet:0.1] [--hidden 1024] [--sequence 2048] ...

One process and one device, a CPU or a GPU. The layers are in networks of two layers and get realistic inputs, so that
they choose as many tokens as configured. The parts take turns; results are medians. What the parts do not cover
(residual sums, auxiliary losses, statistics) is reported as the rest. GB/s is based on the least number of bytes that a
part can move.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megadyn.arguments import add_json_argument, command_parser
from megadyn.benchmark.clock import Laps, add_device_arguments, device_of, machine
from megadyn.benchmark.models import DEFAULT_MODELS, REFERENCE, Model, add_shape_arguments, build, shape_line
from megadyn.benchmark.parts import WHOLE, TimedPart, choice_of, loss_part, parts_of
from megadyn.benchmark.step import CHECKED_TOKENS, FP32_TOLERANCE, as_written, shown_error
from megadyn.errors import UserError
from megadyn.kernels.rule import use_kernels
from megadyn.kinds import DENSE, known_kinds
from megadyn.model.block import Layer, Stream
from megadyn.network import Head, Network
from megadyn.parallel.params import PRECISIONS
from megadyn.routing.layer import RoutedLayer

HALF_TOLERANCE = 0.05
"""Tolerance in half precision: about ten roundings of 2^-8. A wrong formula differs by more."""


@dataclass
class Figure:
    """Measurements of one part."""

    layer: str
    part: str
    forward: float
    backward: float
    """Median seconds; backward is 0 for a part without gradients."""
    share: float
    """Fraction of its layer's time."""
    flops: float
    """Forward and backward, causal attention counted at half."""
    bytes: float
    counted: float | None
    """Operations counted by torch, divided by those of `planning/flops`, on a short sequence."""
    float64_error: float | None
    """Error of the output relative to a float64 copy, on a short sequence with the same tokens chosen."""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    @property
    def tflops(self) -> float | None:
        return self.flops / self.seconds / 1e12 if self.flops else None

    @property
    def gbytes(self) -> float | None:
        """GB/s."""
        return self.bytes / self.seconds / 1e9 if self.bytes else None


@dataclass
class Case:
    """A part, and the module whose parameters it uses."""

    part: TimedPart
    module: nn.Module
    counted: float | None = None
    float64_error: float | None = None
    """As in `Figure`."""
    grads: list[Tensor] | None = None
    """Gradients of the outputs, created in the first run so that no timed run creates them."""

    def run(self, laps: Laps | None = None) -> tuple[Tensor, ...]:
        """Runs forward and backward with a mark after each; returns the outputs. Clears all gradients."""
        # Noise depends on the number of the micro-batch within the step: always use the first.
        if isinstance(self.module, RoutedLayer):
            for tracker in self.module.trackers().values():
                tracker.forget()
        found = self.part.run(*self.part.inputs)
        if laps:
            laps.mark()
        outputs = found if isinstance(found, tuple) else (found,)
        backward = [out for out in outputs if out.requires_grad]
        if self.grads is None:
            self.grads = [torch.randn_like(out) for out in backward]
        if backward:
            torch.autograd.backward(backward, self.grads)
        if laps:
            laps.mark()
        for tensor in (*self.part.inputs, *self.module.parameters()):
            tensor.grad = None
        return tuple(out.detach() for out in outputs)


def cases_of(model: Model, tokens: Tensor, labels: Tensor, *, unchecked: bool) -> list[Case]:
    """Parts of each kind of layer that `model` adds to the dense one; for the dense model, its parts and the head's."""
    network, head = model.module, model.module.head
    assert isinstance(network, Network) and isinstance(head, Head)
    routed = model.config.routing.name != DENSE
    brief = tokens[:, :CHECKED_TOKENS]
    reached, short = reached_by(network, tokens), reached_by(network, brief)
    cases = []
    for kind in sorted(set(model.config.layer_types) - ({DENSE} if routed else set())):
        index = model.config.layer_types.index(kind)
        layer = network.layers[index + 1]  # after the embedding
        assert isinstance(layer, Layer)
        selection = choice_of(layer, short[index])
        parts = parts_of(layer, kind, reached[index], model.config, choice_of(layer, reached[index]))
        small = parts_of(layer, kind, short[index], model.config, selection)
        exact: list[TimedPart] = []
        twin = layer
        if not unchecked:
            twin = deepcopy(layer).double()
            exact = parts_of(twin, kind, in_float64(short[index]), model.config, selection)
        cases += [
            checked(part, like, layer, wanted, twin)
            for part, like, wanted in zip_longest(parts, small, exact)
        ]
    if not routed:
        twin_head = head if unchecked else deepcopy(head).double()
        of_head = [
            loss_part(whose, hidden, wanted, model.config)
            for whose, hidden, wanted in (
                (head, reached[-1].hidden, labels),
                (head, short[-1].hidden, labels[:, :CHECKED_TOKENS]),
                (twin_head, short[-1].hidden.to(twin_head.weight.dtype), labels[:, :CHECKED_TOKENS]),
            )
        ]
        cases.append(checked(of_head[0], of_head[1], head, None if unchecked else of_head[2], twin_head))
    return cases


@torch.no_grad()
def reached_by(network: Network, tokens: Tensor) -> list[Stream]:
    """The input of each layer after the embedding, and of the head."""
    streams: list[Any] = [network.layers[0](tokens)]
    for layer in network.layers[1:]:
        streams.append(layer(streams[-1]))
    return streams


def in_float64(stream: Stream) -> Stream:
    return Stream(stream.hidden.double(), None if stream.score is None else stream.score.double())


def checked(
    part: TimedPart, small: TimedPart, module: nn.Module, exact: TimedPart | None, twin: nn.Module
) -> Case:
    """`part` of `module`. torch counts its operations on the `small` inputs, and its outputs are compared with `exact`,
    the same part of a float64 `twin`.

    Raises UserError if fp32 differs too much from float64.
    """
    case, trial = Case(part, module), Case(small, module)
    with as_written(module), FlopCounterMode(display=False) as counter:
        outputs = trial.run()
    planned = small.flops + small.unseen
    case.counted = counter.get_total_flops() / planned if planned else None
    if exact is None:
        return case
    with as_written(twin):
        wanted = Case(exact, twin).run()
    outputs = trial.run()
    errors = [
        ((out.double() - want).norm() / want.norm()).item()
        for out, want in zip(outputs, wanted, strict=True)
        if out.is_floating_point()
    ]
    # The output may be wider than the weights.
    is_half = any(weight.dtype != torch.float32 for weight in module.parameters())
    # In half precision a near tie may be decided differently.
    if not errors or (is_half and part.name == WHOLE):
        return case
    case.float64_error = max(errors)
    if case.float64_error > (HALF_TOLERANCE if is_half else FP32_TOLERANCE):
        raise UserError(
            f"{part.layer}, {part.name}: relative difference of {case.float64_error:.1e} from float64"
        )
    return case


def measure(args: argparse.Namespace, device: torch.device) -> list[Figure]:
    torch.manual_seed(0)
    dtype = PRECISIONS[args.precision]
    tokens = torch.randint(args.vocab, (args.batch, args.sequence + 1), device=device)
    tokens, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    cases: list[Case] = []
    for name in args.models:
        if name == REFERENCE:
            raise UserError(
                f"--models {name}: must be KIND[:CAPACITY] with KIND one of {', '.join(known_kinds())}"
            )
        cases += cases_of(
            build(name, args, device, dtype, tokens, []), tokens, labels, unchecked=args.unchecked
        )
    times: list[list[list[float]]] = [[] for _ in cases]
    for turn in range(args.warmup + args.rounds):
        for case, found in zip(cases, times, strict=True):
            laps = Laps(device)
            case.run(laps)
            if turn >= args.warmup:
                found.append(laps.seconds())
    medians = [[statistics.median(lap) for lap in zip(*found)] for found in times]
    whole = {
        case.part.layer: sum(laps) for case, laps in zip(cases, medians) if case.part.name in (WHOLE, "loss")
    }
    figures: list[Figure] = []
    for case, (forward, backward) in zip(cases, medians):
        part = case.part
        if part.name == WHOLE:
            mine = [figure for figure in figures if figure.layer == part.layer]
            rest = [
                forward - sum(figure.forward for figure in mine),
                backward - sum(figure.backward for figure in mine),
            ]
            figures.append(
                Figure(part.layer, "rest", rest[0], rest[1], sum(rest) / whole[part.layer], 0, 0, None, None)
            )
        figures.append(
            Figure(
                part.layer,
                part.name,
                forward,
                backward,
                (forward + backward) / whole[part.layer],
                part.flops,
                part.bytes,
                case.counted,
                case.float64_error,
            )
        )
    return figures


def as_table(figures: Sequence[Figure]) -> str:
    rows = [
        "| layer | part | forward, ms | backward, ms | share | GFLOP | TFLOP/s | GB/s | counted | off float64 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        counted = "" if figure.counted is None else f"{figure.counted:.3f}"
        rows.append(
            f"| {figure.layer} | {figure.part} | {figure.forward * 1e3:.2f} | {figure.backward * 1e3:.2f} | "
            f"{figure.share:.1%} | {shown(figure.flops / 1e9 or None)} | {shown(figure.tflops)} | "
            f"{shown(figure.gbytes)} | {counted} | {shown_error(figure.float64_error)} |"
        )
    return "\n".join(rows)


def shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark layer", __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=DEFAULT_MODELS,
        metavar="KIND[:CAPACITY]",
        help="kinds whose layers are measured (default: %(default)s)",
    )
    add_shape_arguments(parser, layers=2, rounds=7, warmup=2)
    add_device_arguments(parser)
    parser.add_argument("--unchecked", action="store_true", help="skip the comparison with float64")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.recompute = "none"
    device = device_of(args)
    chosen, _ = use_kernels(args.kernels, args.hidden)
    figures = measure(args, device)
    print(f"{machine(device)}, {args.precision}, kernels: {chosen}; {shape_line(args)}\n")
    print(as_table(figures))
    if args.json:
        print(
            json.dumps(
                [
                    asdict(figure) | {name: getattr(figure, name) for name in ("seconds", "tflops", "gbytes")}
                    for figure in figures
                ]
            )
        )
