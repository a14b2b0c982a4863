"""Seconds of a training step (forward, backward, AdamW) of each kind of model, compared with dense and with transformers' Qwen2.

    megadyn benchmark step [--models dense dtf:0.5 mod:0.125 dtrnet:0.1 qwen2] [--hidden 1024] [--sequence 2048] ...

One process and one device, a CPU or a GPU. The models take turns, step by step, on the same tokens, so that other load
on the machine slows all of them alike; results are medians. `qwen2` has the weights of the dense model. DTRNet's
routers are set so that the given share of tokens attends; the learning rate is too small to change that.

Tokens/s count every token of the batch, including skipped ones. They are dense-equivalent: what a dense model of these
shapes would have to reach. MFU counts only the operations that the model itself needs.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadyn.arguments import above_zero, add_json_argument, command_parser
from megadyn.benchmark.clock import add_device_arguments, device_of, device_peak, machine, timed
from megadyn.benchmark.models import DEFAULT_MODELS, REFERENCE, Model, add_shape_arguments, build, shape_line
from megadyn.config import RECOMPUTE
from megadyn.errors import UserError
from megadyn.kernels.rule import use_kernels
from megadyn.model.block import Layer
from megadyn.parallel.params import PRECISIONS
from megadyn.planning.flops import training_flops

CHECKED_TOKENS = 512
"""Tokens of a sequence for the comparison with float64 and for torch's count of operations; both cost more than a step."""
FP32_TOLERANCE = 1e-4


@dataclass
class Figure:
    """Measurements of one model. Shares are relative to the first model."""

    name: str
    seconds: float
    fastest: float
    flops: float
    """Per step, causal attention counted at half."""
    counted: float
    """Operations counted by torch, divided by those of `planning/flops`, on a short sequence."""
    float64_error: float | None
    """The larger relative difference of loss and gradient norm from a float64 copy, on a short sequence. None:
    unchecked."""
    tokens_per_second: float
    """Including skipped tokens: dense-equivalent."""
    mfu_half: float
    """Causal attention counted at half, as Megatron-LM does."""
    mfu_full: float
    """The whole square of attention counted, as llm-foundry, nanotron and torchtitan do."""
    flops_share: float = 1.0
    time_share: float = 1.0

    @property
    def saved(self) -> float | None:
        """Time saved divided by FLOPs saved."""
        return (1 - self.time_share) / (1 - self.flops_share) if self.flops_share < 0.99 else None

    @property
    def dense_equivalent(self) -> float:
        """Tokens/s relative to the first model."""
        return 1 / self.time_share


@dataclass
class Contest:
    """The models, which take turns."""

    models: list[Model]
    tokens: Tensor
    labels: Tensor
    times: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, warmup: int) -> None:
        optimizers = [
            torch.optim.AdamW(model.module.parameters(), lr=1e-9, fused=True) for model in self.models
        ]
        for turn in range(warmup + rounds):
            for model, optimizer in zip(self.models, optimizers, strict=True):
                seconds = timed(partial(self.step, model, optimizer), self.tokens.device)
                if turn >= warmup:
                    self.times.setdefault(model.name, []).append(seconds)

    def step(self, model: Model, optimizer: torch.optim.Optimizer) -> None:
        model.loss(self.tokens, self.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def float64_error(model: Model, tokens: Tensor, labels: Tensor) -> float:
    exact = Model(model.name, deepcopy(model.module).double(), model.config)
    with as_written(exact.module):  # other attention kernels do not support float64
        right = loss_and_norm(exact, tokens, labels)
    return max(
        abs(got - want) / abs(want)
        for got, want in zip(loss_and_norm(model, tokens, labels), right, strict=True)
    )


def loss_and_norm(model: Model, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    loss = model.loss(tokens, labels)
    loss.backward()
    norm = (
        torch.stack([p.grad.double().square().sum() for p in model.module.parameters() if p.grad is not None])
        .sum()
        .sqrt()
    )
    model.module.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def counted_share(model: Model, tokens: Tensor, labels: Tensor) -> float:
    """torch counts the whole square of attention, and only for plain attention."""
    with as_written(model.module), FlopCounterMode(display=False) as counter:
        model.loss(tokens, labels).backward()
    model.module.zero_grad(set_to_none=True)
    batch, length = tokens.shape
    return counter.get_total_flops() / (batch * whole_square_flops(model, length))


@contextmanager
def as_written(module: nn.Module) -> Iterator[None]:
    """Runs layers uncompiled and attention as plain matrix products, whatever the module is configured for."""
    layers = [layer for layer in module.modules() if isinstance(layer, Layer)]
    compiled = [layer.compile_run for layer in layers]
    backends = [layer.self_attn.backends for layer in layers]
    for layer in layers:
        layer.compile_run, layer.self_attn.backends = False, ("sdpa", "sdpa")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for layer, compile_run, pair in zip(layers, compiled, backends):
            layer.compile_run, layer.self_attn.backends = compile_run, pair


def whole_square_flops(model: Model, length: int) -> float:
    """Operations of a step on one sequence, including the half of attention's square that is masked."""
    return training_flops(model.config, length, whole_square=True)


def measure(args: argparse.Namespace, device: torch.device) -> tuple[list[Figure], str]:
    torch.manual_seed(0)
    dtype = PRECISIONS[args.precision]
    tokens = torch.randint(args.vocab, (args.batch, args.sequence + 1), device=device)
    contest = Contest([], tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    short = [part[:, :CHECKED_TOKENS].contiguous() for part in (contest.tokens, contest.labels)]
    checks: dict[str, tuple[float, float | None]] = {}
    for name in args.models:
        model = build(name, args, device, dtype, contest.tokens, contest.models, compile=args.compile)
        error = None if args.unchecked else float64_error(model, *short)
        checks[name] = counted_share(model, *short), error
        if dtype == torch.float32 and error is not None and error > FP32_TOLERANCE:
            raise UserError(
                f"{name}: loss or gradients have a relative difference of {error:.1e} from float64"
            )
        contest.models.append(model)
    torch._dynamo.reset()  # compile only for the contest's shapes, not for those of the checks
    contest.run(args.rounds, args.warmup)
    peak, source = device_peak(device, dtype, args.peak_tflops)
    figures: list[Figure] = []
    for model in contest.models:
        seconds = statistics.median(contest.times[model.name])
        flops = args.batch * training_flops(model.config, args.sequence)
        figure = Figure(
            model.name,
            seconds,
            min(contest.times[model.name]),
            flops,
            *checks[model.name],
            args.batch * args.sequence / seconds,
            flops / seconds / peak,
            args.batch * whole_square_flops(model, args.sequence) / seconds / peak,
        )
        first = figures[0] if figures else figure
        figure.flops_share, figure.time_share = flops / first.flops, seconds / first.seconds
        figures.append(figure)
    return figures, source


def as_table(figures: Sequence[Figure]) -> str:
    rows = [
        "| model | ms (fastest) | FLOPs | time | time saved / FLOPs saved | tokens/s, dense-equivalent "
        "| MFU, half / full attention | counted | off float64 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        saved = "" if figure.saved is None else f"{figure.saved:.2f}"
        rows.append(
            f"| {figure.name} | {figure.seconds * 1e3:.1f} ({figure.fastest * 1e3:.1f}) | {figure.flops_share:.3f} | "
            f"{figure.time_share:.3f} | {saved} | {figure.tokens_per_second:,.0f} "
            f"({figure.dense_equivalent:.2f}x) | {figure.mfu_half:.1%} / {figure.mfu_full:.1%} | {figure.counted:.3f} | "
            f"{shown_error(figure.float64_error)} |"
        )
    return "\n".join(rows)


def shown_error(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark step", __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=(*DEFAULT_MODELS, REFERENCE),
        metavar="KIND[:CAPACITY]",
        help="shares are relative to the first (default: %(default)s)",
    )
    add_shape_arguments(parser, rounds=7, warmup=2)
    add_device_arguments(parser)
    parser.add_argument(
        "--peak-tflops",
        type=above_zero,
        metavar="N",
        help="peak of the device, for MFU (default: its datasheet's, or else a matrix product measured here)",
    )
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="skip the comparison with float64, whose copy needs four times the memory of bf16",
    )
    parser.add_argument(
        "--recompute", choices=RECOMPUTE, default="none", help="for our models; qwen2 supports none and full"
    )
    parser.add_argument("--compile", action="store_true", help="compile our models layer by layer")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = device_of(args)
    chosen, _ = use_kernels(args.kernels, args.hidden)
    figures, peak = measure(args, device)
    print(f"{machine(device)}, {args.precision}, kernels: {chosen}; {shape_line(args)}; peak: {peak}\n")
    print(as_table(figures))
    if args.json:
        print(
            json.dumps(
                [
                    asdict(figure) | {name: getattr(figure, name) for name in ("saved", "dense_equivalent")}
                    for figure in figures
                ]
            )
        )
