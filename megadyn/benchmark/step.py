"""Seconds of a training step (forward, backward, AdamW) of each kind of model, against dense and against transformers' Qwen2.

    python tools/benchmark.py step [--models dense mod:0.125 dtf:0.5 dtrnet:0.1 qwen2] [--hidden 1024] [--sequence 2048] ...

One process and one device. The models take turns, step by step, on the same tokens, so that whatever else slows the
machine slows all alike; medians count. `qwen2` has the weights of the dense model. DTRNet's routers are set so that as
many tokens attend as its number says; the learning rate is too small to change that.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadyn.benchmark.models import Model, build
from megadyn.config import RECOMPUTE
from megadyn.data.arguments import add_json_argument, positive
from megadyn.errors import Parser, UserError
from megadyn.parallel.params import DTYPES
from megadyn.planning.flops import attention_flops, training_flops

CHECKED_TOKENS = 512
"""Of a sequence, for the comparison with float64 and for torch's count of operations, which both cost more than a step."""
FP32_TOLERANCE = 1e-4
PEAKS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}
"""Dense bf16 operations a second, by datasheet."""


@dataclass
class Figure:
    """What is measured of one model. Shares are of the first model's."""

    name: str
    seconds: float
    fastest: float
    flops: float
    """Of a step, causal attention counted at half."""
    counted: float
    """Operations that torch counts, by those that `planning/flops` does, on a short sequence."""
    float64_error: float
    """Relative difference of loss and of gradient norm from a float64 copy, the larger; on a short sequence."""
    tokens_per_second: float
    mfu_half: float
    """Causal attention counted at half, as Megatron-LM does."""
    mfu_full: float
    """The whole square counted, as llm-foundry, nanotron and torchtitan do."""
    flops_share: float = 1.0
    time_share: float = 1.0

    @property
    def saved(self) -> float | None:
        """Time saved by FLOPs saved."""
        return (1 - self.time_share) / (1 - self.flops_share) if self.flops_share < 0.99 else None


@dataclass
class Contest:
    """The models that take turns."""

    models: list[Model]
    tokens: Tensor
    labels: Tensor
    times: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, warmup: int) -> None:
        optimizers = [torch.optim.AdamW(model.module.parameters(), lr=1e-9, fused=True) for model in self.models]
        for turn in range(warmup + rounds):
            for model, optimizer in zip(self.models, optimizers, strict=True):
                wait(self.tokens.device)
                began = time.perf_counter()
                model.loss(self.tokens, self.labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                wait(self.tokens.device)
                if turn >= warmup:
                    self.times.setdefault(model.name, []).append(time.perf_counter() - began)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def float64_error(model: Model, tokens: Tensor, labels: Tensor) -> float:
    exact = Model(model.name, deepcopy(model.module).double(), model.config)
    found = [loss_and_norm(one, tokens, labels) for one in (model, exact)]
    return max(abs(got - want) / abs(want) for got, want in zip(*found, strict=True))


def loss_and_norm(model: Model, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    loss = model.loss(tokens, labels)
    loss.backward()
    norm = torch.stack([p.grad.double().square().sum() for p in model.module.parameters() if p.grad is not None]).sum().sqrt()
    model.module.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def counted_share(model: Model, tokens: Tensor, labels: Tensor) -> float:
    """torch counts the whole square of scores, and fused attention on a CPU not at all."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(tokens, labels).backward()
    model.module.zero_grad(set_to_none=True)
    batch, length = tokens.shape
    return counter.get_total_flops() / (batch * whole_square_flops(model, length))


def whole_square_flops(model: Model, length: int) -> float:
    """Of a step on one sequence, with the half of attention's square that no token sees."""
    return training_flops(model.config, length) + 3 * sum(attention_flops(model.config, length))


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(operations a second, where the figure is from): a datasheet's for a GPU in half precision, else a matrix product's."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name and dtype != torch.float32:
                return peak, f"{peak / 1e12:.1f} TFLOP/s by the datasheet"
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, device) for _ in range(8))
    return 2 * size**3 / best, f"{2 * size**3 / best / 1e12:.3g} TFLOP/s, a {size} x {size} matrix product here"


def timed(work: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def measure(args: argparse.Namespace, device: torch.device) -> tuple[list[Figure], str]:
    torch.manual_seed(0)
    dtype = DTYPES[args.precision]
    tokens = torch.randint(args.vocab, (args.batch, args.sequence + 1), device=device)
    contest = Contest([], tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    short = [part[:, :CHECKED_TOKENS].contiguous() for part in (contest.tokens, contest.labels)]
    checks: dict[str, tuple[float, float]] = {}
    for name in args.models:
        model = build(name, args, device, dtype, contest.tokens, contest.models)
        checks[name] = counted_share(model, *short), float64_error(model, *short)
        if dtype == torch.float32 and checks[name][1] > FP32_TOLERANCE:
            raise UserError(f"{name}: loss or gradients differ from float64's by {checks[name][1]:.1e} of their size")
        contest.models.append(model)
    torch._dynamo.reset()                # graphs are to be for the contest's shapes, not for the checks' as well
    contest.run(args.rounds, args.warmup)
    peak, source = device_peak(device, dtype)
    figures: list[Figure] = []
    for model in contest.models:
        seconds = statistics.median(contest.times[model.name])
        flops = args.batch * training_flops(model.config, args.sequence)
        figure = Figure(model.name, seconds, min(contest.times[model.name]), flops, *checks[model.name],
                        args.batch * args.sequence / seconds, flops / seconds / peak,
                        args.batch * whole_square_flops(model, args.sequence) / seconds / peak)
        first = figures[0] if figures else figure
        figure.flops_share, figure.time_share = flops / first.flops, seconds / first.seconds
        figures.append(figure)
    return figures, source


def as_table(figures: Sequence[Figure]) -> str:
    rows = ["| model | ms (fastest) | FLOPs | time | time saved / FLOPs saved | tokens/s | MFU, half / full attention | counted "
            "| off float64 |", "|---|---|---|---|---|---|---|---|---|"]
    for figure in figures:
        saved = "" if figure.saved is None else f"{figure.saved:.2f}"
        rows.append(f"| {figure.name} | {figure.seconds * 1e3:.1f} ({figure.fastest * 1e3:.1f}) | {figure.flops_share:.3f} | "
                    f"{figure.time_share:.3f} | {saved} | {figure.tokens_per_second:,.0f} | "
                    f"{figure.mfu_half:.1%} / {figure.mfu_full:.1%} | {figure.counted:.3f} | {figure.float64_error:.0e} |")
    return "\n".join(rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmark.py step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dense", "mod:0.125", "dtf:0.5", "dtrnet:0.1", "qwen2"],
                        metavar="KIND[:CAPACITY]", help="shares are of the first's (default: %(default)s)")
    for name, default in (("hidden", 1024), ("layers", 4), ("heads", 16), ("kv-heads", 4), ("ffn", 2816), ("vocab", 8192),
                          ("sequence", 2048), ("batch", 1), ("rounds", 7), ("warmup", 2)):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none", help="of ours; qwen2 knows none and full")
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile, layer by layer")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    figures, peak = measure(args, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {args.precision}; {args.layers} layers, hidden {args.hidden}, ffn {args.ffn}, "
          f"vocabulary {args.vocab}, {args.batch} x {args.sequence} tokens; peak: {peak}\n")
    print(as_table(figures))
    if args.json:
        print(json.dumps([asdict(figure) | {"saved": figure.saved} for figure in figures]))
