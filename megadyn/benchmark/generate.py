"""Milliseconds of prefill and per decoded token, for each kind of model as transformers serves it, compared with its Qwen2.

    megadyn benchmark generate [--models qwen2 dense dtf:0.5 mod:0.125 dtrnet:0.1] [--batch 1 8] [--context 512 2048] ...
    megadyn benchmark generate --export HF_DIR ... [--data PREFIX] [--batch 1 8] [--context 512 2048] ...

One process and one device, a CPU or a GPU. Weights are random, with thresholds set so that layers keep the planned
share of tokens.
`--export` measures exported folders instead, against a Qwen2 of the first one's shape; with `--data` the table has their
losses too, in nats per token of the dataset, routed as in decoding: loss by time and by bytes of the cache. `--static` gives
every model a cache of fixed size, so that every row runs in every layer (FLOPs stay those of kept tokens), and `--compile`
compiles the decoding step as one graph. In each round the models take turns:
first a prefill of the context, then one token at a time for each row. Tokens are random, and the same for all models
and rounds, so that no model decodes a repeating loop. Prefill times are medians over rounds. Decode times are medians
over rounds per step, then the mean over steps, because a kept token and a skipped one cost different times. All models
and their caches are in memory at once.

Shares are relative to the first model. FLOPs are the planner's, at the measured shares of kept tokens. `KV` counts the
bytes of tokens in the cache, not the space it has reserved. Peak memory is reported only for GPUs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.benchmark.clock import device_of, machine, timed
from megadyn.benchmark.models import DEFAULT_MODELS, REFERENCE, add_size_arguments
from megadyn.benchmark.served import Served, models_of
from megadyn.config import ModelConfig
from megadyn.errors import UserError
from megadyn.kinds import DENSE
from megadyn.parallel.params import PRECISIONS
from megadyn.paths import user_path
from megadyn.planning.flops import head_flops

MODELS = (REFERENCE, DENSE, *(name for name in DEFAULT_MODELS if ":" in name))
"""Qwen2, dense, and the kinds that define a capacity for benchmarks."""


Timer = Callable[[Callable[[], Any], torch.device], float]


@dataclass
class Shares:
    """Share of tokens that each layer kept in its attention, first layer to last."""

    prefill: list[float]
    decode: list[float]


@dataclass
class Phase:
    """Measurements of prefill or of decoding."""

    seconds: float
    """A whole prefill, or one decoded token in every row."""
    flops: float
    """For all rows."""
    tokens_per_second: float
    peak_bytes: int | None
    time_share: float = 1.0
    flops_share: float = 1.0

    @property
    def saved(self) -> float | None:
        """Time saved divided by FLOPs saved."""
        return (1 - self.time_share) / (1 - self.flops_share) if self.flops_share < 0.99 else None

    def against(self, first: "Phase") -> None:
        self.time_share, self.flops_share = self.seconds / first.seconds, self.flops / first.flops


@dataclass
class Figure:
    name: str
    batch: int
    context: int
    prefill: Phase
    decode: Phase
    kv_bytes: float
    """Per token of the context, all layers together."""
    shares: Shares
    decode_flops: list[float]
    """Per layer, for one token."""
    loss: float | None
    """Of an export on the dataset, in nats per token."""


@dataclass
class Run:
    """One model at one batch size and context, and the times of its turns."""

    served: Served
    tokens: Tensor
    context: int
    timed: Timer
    prefills: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    """Seconds per round and step."""
    peaks: dict[str, int] = field(default_factory=dict)
    held: list[list[int]] = field(default_factory=list)
    """Tokens of all rows that each layer kept: after the prefill, and after the last step."""
    stored: int = 0
    """Cached tokens after the prefill, summed over rows and layers."""
    cache: Any = None
    static: bool = False

    def prefill(self) -> None:
        self.cache = self.served.static_cache(*self.tokens.shape) if self.static else None
        self.prefills.append(self.measured("prefill", 0, self.context))
        self.held, self.stored = [self.kept()], self.in_cache()
        self.steps.append([])

    def step(self, at: int) -> None:
        self.steps[-1].append(self.measured("decode", at, at + 1))

    def end(self) -> None:
        self.held.append(self.kept())
        self.cache = None

    def forget(self) -> None:
        """Discards a warm-up round."""
        self.prefills, self.steps, self.peaks = [], [], {}

    def measured(self, name: str, start: int, end: int) -> float:
        """Seconds of a forward call on columns `start` to `end`."""
        device = self.tokens.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = self.timed(partial(self.forward, start, end), device)
        if device.type == "cuda":
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
        return seconds

    def forward(self, start: int, end: int) -> None:
        model = self.served.step if start else self.served.model
        out = model(self.tokens[:, start:end], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values

    def kept(self) -> list[int]:
        """Tokens that each layer kept; for a layer that some tokens pass twice, those that pass twice."""
        if self.served.is_routed:
            rows = len(self.tokens)
            return [sum(held_by(layer.again or layer, rows)) for layer in self.cache.layers]
        return [int(self.cache.get_seq_length()) * len(self.tokens)] * self.served.config.num_layers

    def in_cache(self) -> int:
        if not self.served.is_routed:
            return sum(self.kept())
        caches = [cache for layer in self.cache.layers for cache in (layer, layer.again) if cache]
        return sum(sum(held_by(cache, len(self.tokens))) for cache in caches)

    def figure(self) -> Figure:
        rows, columns = self.tokens.shape
        steps = columns - self.context
        before, after = self.held
        shares = Shares(
            [held / rows / self.context for held in before],
            [(end - start) / rows / steps for start, end in zip(before, after, strict=True)],
        )
        config = self.served.config
        of_token = token_flops(config, self.context, shares)
        prefill = rows * (sum(prefill_flops(config, self.context, shares.prefill)) + head_flops(config, 1))
        decode = rows * (sum(of_token) + head_flops(config, 1))
        whole = statistics.median(self.prefills)
        step = statistics.mean(statistics.median(times) for times in zip(*self.steps, strict=True))
        assert config.num_kv_heads and config.head_dim
        size = 2 * config.num_kv_heads * config.head_dim * self.served.model.dtype.itemsize
        return Figure(
            self.served.name,
            rows,
            self.context,
            Phase(whole, prefill, rows * self.context / whole, self.peaks.get("prefill")),
            Phase(step, decode, rows / step, self.peaks.get("decode")),
            self.stored * size / (rows * self.context),
            shares,
            of_token,
            self.served.loss,
        )


def held_by(cache: Any, rows: int) -> list[int]:
    """Tokens in a layer's cache, per row; exports of earlier versions have growing caches alone."""
    return list(cache.held(rows)) if hasattr(cache, "held") else list(cache.counts)


def prefill_flops(config: ModelConfig, length: int, shares: Sequence[float]) -> list[float]:
    """Forward operations of each layer on one sequence, with these shares of kept tokens."""
    return [
        config.routing.flops(layer, config, length, share).total
        for layer, share in zip(config.layer_types, shares, strict=True)
    ]


def token_flops(config: ModelConfig, context: int, shares: Shares) -> list[float]:
    """Forward operations of each layer for an average token that follows `context` tokens.

    Attention on a sequence twice as long as the context costs as much per token as one token after the context.
    """
    found = []
    for layer, held, kept in zip(config.layer_types, shares.prefill, shares.decode, strict=True):
        one = config.routing.flops(layer, config, 2 * context, kept)
        attention = one.attention * (held / kept if kept else 0.0)
        found.append((one.total - one.attention + attention) / (2 * context))
    return found


def take_turns(runs: Sequence[Run]) -> None:
    """One round: the prefill of every model, then step by step."""
    for run in runs:
        run.prefill()
    for at in range(runs[0].context, runs[0].tokens.shape[1]):
        for run in runs:
            run.step(at)
    for run in runs:
        run.end()


def processor_time(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of CPU time that this process used, regardless of other processes."""
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.inference_mode()
def measure(args: argparse.Namespace, device: torch.device) -> tuple[list[Figure], list[Served]]:
    with torch.inference_mode(False):
        models = models_of(args, device, PRECISIONS[args.precision], args.context)
    figures: list[Figure] = []
    for batch in args.batch:
        for context in args.context:
            vocabulary = min(served.config.vocab_size or args.vocab for served in models)
            generator = torch.Generator().manual_seed(batch)
            tokens = torch.randint(vocabulary, (batch, context + args.steps), generator=generator)
            timer = processor_time if args.cpu_time else timed
            torch._dynamo.reset()  # a graph is of one batch size
            runs = [Run(served, tokens.to(device), context, timer, static=args.static) for served in models]
            for turn in range(args.warmup + args.rounds):
                take_turns(runs)
                if turn < args.warmup:
                    for run in runs:
                        run.forget()
            found = [run.figure() for run in runs]
            for figure in found:
                figure.prefill.against(found[0].prefill)
                figure.decode.against(found[0].decode)
            figures += found
    return figures, models


def as_table(figures: Sequence[Figure]) -> str:
    rows = [
        "| batch x context | model | prefill, ms | time | FLOPs | saved | decoded token, ms | time | FLOPs | saved | tokens/s "
        "| KV, bytes per token | peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with_loss = any(figure.loss is not None for figure in figures)
    if with_loss:
        rows = [rows[0] + " loss |", rows[1] + "---|"]
    for figure in figures:
        peak = figure.decode.peak_bytes
        rows.append(
            f"| {figure.batch} x {figure.context} | {figure.name} | {of_phase(figure.prefill)} | {of_phase(figure.decode)} "
            f"| {figure.decode.tokens_per_second:,.1f} | {figure.kv_bytes:,.0f} "
            f"| {'' if peak is None else f'{peak / 2**20:,.0f}'} |"
        )
        if with_loss:
            rows[-1] += " |" if figure.loss is None else f" {figure.loss:.4f} |"
    return "\n".join(rows)


def of_phase(phase: Phase) -> str:
    saved = "" if phase.saved is None else f"{phase.saved:.2f}"
    return f"{phase.seconds * 1e3:.2f} | {phase.time_share:.2f} | {phase.flops_share:.2f} | {saved}"


def layer_table(figures: Sequence[Figure], types: dict[str, list[str]]) -> str:
    """What layers of each type kept and cost, for the last batch size and context."""
    rows = [
        "| model | layers | kept in prefill | kept in decoding | MFLOP per decoded token |",
        "|---|---|---|---|---|",
    ]
    last = figures[-1]
    for figure in figures:
        if (figure.batch, figure.context) != (last.batch, last.context):
            continue
        for name in dict.fromkeys(types[figure.name]):
            mine = [i for i, other in enumerate(types[figure.name]) if other == name]

            def mean(numbers: Sequence[float], mine: Sequence[int] = mine) -> float:
                return statistics.mean(numbers[i] for i in mine)

            rows.append(
                f"| {figure.name} | {len(mine)} {name} | {mean(figure.shares.prefill):.3f} "
                f"| {mean(figure.shares.decode):.3f} | {mean(figure.decode_flops) / 1e6:.2f} |"
            )
    return "\n".join(rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark generate", __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=MODELS,
        metavar="KIND[:CAPACITY]",
        help="models to measure; also qwen2; shares are relative to the first (default: %(default)s)",
    )
    parser.add_argument(
        "--export",
        type=user_path,
        nargs="+",
        metavar="HF_DIR",
        help="measure these exported folders instead of --models and sizes",
    )
    parser.add_argument("--data", type=user_path, metavar="PREFIX", help="a dataset, for the loss of exports")
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="of --data, from its start (default: all)"
    )
    parser.add_argument("--static", action="store_true", help="decode with caches of fixed size")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step; needs --static")
    add_size_arguments(parser, layers=8, steps=32, rounds=3)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8], metavar="N", help="rows")
    parser.add_argument(
        "--context", type=positive, nargs="+", default=[512, 2048], metavar="N", help="tokens in the prefill"
    )
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds that are not counted")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure CPU time instead of wall-clock time; for one thread on a machine that others use too",
    )
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.sequence, args.recompute = max(args.context) + args.steps, "none"
    device = device_of(args)
    if args.cpu_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError(
            "--cpu-time: needs a CPU and one thread (OMP_NUM_THREADS=1), because it adds up the time of all threads"
        )
    if args.compile and not args.static:
        raise UserError("--compile: needs --static, because a growing cache has another shape at each step")
    if args.compile and args.warmup < 1:
        raise UserError("--compile: needs --warmup of at least 1, because the first steps compile")
    if args.data is not None and args.export is None:
        raise UserError("--data: needs --export, because random weights have no loss to compare")
    figures, models = measure(args, device)
    print(
        f"{machine(device)}, {args.precision}; {shape_of(models[0].config)}, {args.steps} decoded tokens, "
        f"median of {args.rounds} rounds"
        f"{', processor time' if args.cpu_time else ''}"
        f"{', static caches' if args.static else ''}"
        f"{', compiled steps' if args.compile else ''}\n"
    )
    print(as_table(figures))
    print()
    print(layer_table(figures, {served.name: served.config.layer_types for served in models}))
    if args.json:
        print(json.dumps([as_object(figure) for figure in figures]))


def as_object(figure: Figure) -> dict[str, Any]:
    found = asdict(figure)
    for name in ("prefill", "decode"):
        found[name]["saved"] = getattr(figure, name).saved
    return found


def shape_of(config: ModelConfig) -> str:
    return (
        f"{config.num_layers} layers, hidden {config.hidden_size}, heads {config.num_heads} and {config.num_kv_heads}, "
        f"ffn {config.ffn_size}, vocabulary {config.vocab_size}"
    )
