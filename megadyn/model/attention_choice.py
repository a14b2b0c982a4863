"""Which attention `model.attention: auto` takes on a GPU: the fastest one, measured at the run's own shape when the run starts.

Rows without segments and segments are measured apart, forward and backward, and rows of the chosen tokens too, where each
sequence has the same number of these. A kernel that fails, or computes something
else than torch's plain one, drops out with its reason. All ranks take the same choice: a kernel must run on each of them,
and counts with its slowest time. Of kernels within `MARGIN` of the fastest the first in a fixed order is taken, so that
another start of the run hardly ever takes another; where it does, results differ by rounding. The name in the log, as
`model.attention`, pins a choice.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadyn.config import Config
from megadyn.costs.shape import capacity_count
from megadyn.kernels.rule import own_device, problem_of
from megadyn.log import log
from megadyn.model.attention import (
    attention_backend,
    backend_name,
    causal_attention,
    kernel_lacks,
    no_kernels_for,
)
from megadyn.model.documents import Segments, segments_of
from megadyn.parallel.params import PRECISIONS

ROWS, SEGMENTS = ("flash3", "cudnn", "flash", "sdpa"), ("flash3", "flash", "varlen")
"""Candidates, in the order in which they are preferred among equally fast ones."""
NOT_COMPILED = ("flash3", "cudnn")
"""Their calls may not be part of a compiled graph."""
MARGIN = 1.05
MOST_TOKENS = 2**15
"""Of a measure, unless one sequence is longer."""
PIECES = 4
"""Segments of a row."""
WARMUP, ROUNDS = 3, 5
TOLERANCE = 1e-4
"""Mean squared difference from plain attention, relative to its mean square; bf16 rounds to 4e-6."""

Timer = Callable[[Callable[[], object]], float]
"""Calls its argument some times and returns the milliseconds of one call."""


class Shape(NamedTuple):
    """What is measured: queries [rows, length, heads, head_dim], keys and values with `groups` heads."""

    rows: int
    length: int
    heads: int
    groups: int
    head_dim: int
    chosen: int | None = None
    """Tokens of a row that routed layers take, where that is another number."""


class Tried(NamedTuple):
    """A candidate on one rank, or on all."""

    ms: float | None
    problem: str | None = None

    def __str__(self) -> str:
        return f"none ({self.problem})" if self.ms is None else f"{self.ms:.3g} ms"


Gather = Callable[[Any], Sequence[Any]]
"""Gives the argument of every rank."""
Trials = dict[str, dict[str, Tried]]
"""By case (`rows`, `segments`, `chosen`) and candidate."""


def shape_of(config: Config) -> Shape:
    """The shapes of this run's attention on one rank, with so many samples of a micro-batch that their tokens are few enough."""
    model, training, tensor = config.model, config.training, config.parallel.tensor
    assert model.num_kv_heads is not None and model.head_dim is not None
    length = training.sequence_length
    rows = max(1, min(training.micro_batch_size, MOST_TOKENS // length))
    routing, chosen = model.routing, None
    if routing.has_capacity and not routing.varies:
        count = capacity_count(routing.share, length)
        chosen = count if count < length else None
    heads, groups = model.num_heads // tensor, max(1, model.num_kv_heads // tensor)
    return Shape(rows, length, heads, groups, model.head_dim, chosen)


def cuda_ms(call: Callable[[], object]) -> float:
    """Median over rounds, after a warm-up, of the time that the device takes."""
    for _ in range(WARMUP):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def try_all(shape: Shape, dtype: torch.dtype, device: torch.device, compile: bool, timer: Timer) -> Trials:
    """Tries every candidate on this rank."""
    drawn = torch.Generator(device).manual_seed(0)  # the run's own draws stay as they are
    tensors = [
        torch.randn(
            shape.rows, shape.length, heads, shape.head_dim, dtype=dtype, device=device, generator=drawn
        )
        for heads in (shape.heads, shape.groups, shape.groups, shape.heads)
    ]
    pieces = torch.arange(shape.length, device=device) * PIECES // shape.length
    ids = pieces + PIECES * torch.arange(shape.rows, device=device).unsqueeze(1)
    longest = -(-shape.length // PIECES)
    found = {
        "rows": _tried_each(ROWS, tensors, None, compile, timer),
        "segments": _tried_each(
            SEGMENTS, tensors, segments_of(ids, PIECES * shape.rows, longest), compile, timer
        ),
    }
    if shape.chosen is not None:
        chosen = [x[:, : shape.chosen].contiguous() for x in tensors]
        found["chosen"] = _tried_each(ROWS, chosen, None, compile, timer)
    return found


def _tried_each(
    names: Sequence[str], tensors: Sequence[Tensor], segments: Segments | None, compile: bool, timer: Timer
) -> dict[str, Tried]:
    """Candidates on `tensors`: queries, keys, values and the gradient of the output."""
    q, k, v, gradient = tensors
    with torch.no_grad():
        right = causal_attention(q, k, v, "sdpa", segments).float()
    found = {}
    for name in names:
        problem = kernel_lacks(name)
        if compile and name in NOT_COMPILED:
            problem = "not with training.compile"
        found[name] = (
            Tried(None, problem) if problem else _tried(name, (q, k, v), gradient, segments, right, timer)
        )
    return found


def _tried(
    name: str,
    inputs: tuple[Tensor, ...],
    gradient: Tensor,
    segments: Segments | None,
    right: Tensor,
    timer: Timer,
) -> Tried:
    backend = backend_name(name, "varlen") if segments is None else backend_name("sdpa", name)
    leaves = [x.detach().requires_grad_() for x in inputs]
    ms = 0.0

    def step() -> Tensor:
        q, k, v = leaves
        out = causal_attention(q, k, v, backend, segments)
        torch.autograd.grad(out, leaves, gradient)
        return out

    def trial() -> None:
        nonlocal ms
        off = (step().detach().float() - right).square().mean() / right.square().mean()
        if not off <= TOLERANCE:
            raise ValueError(f"it is {float(off):.1e} off plain attention")
        ms = timer(step)

    problem = problem_of(trial)
    return Tried(None, problem) if problem else Tried(ms)


def agreed(of_ranks: Sequence[Trials]) -> Trials:
    """What holds on all ranks: the slowest time of each candidate, or the first rank's problem."""

    def joined(case: str, name: str) -> Tried:
        every = [(rank, trials[case][name]) for rank, trials in enumerate(of_ranks)]
        for rank, tried in every:
            if tried.ms is None:
                where = f"rank {rank}: " if rank else ""
                return Tried(None, f"{where}{tried.problem}")
        return Tried(max(tried.ms for _, tried in every if tried.ms is not None))

    return {case: {name: joined(case, name) for name in names} for case, names in of_ranks[0].items()}


def fastest(tried: dict[str, Tried]) -> str | None:
    """The first that takes at most `MARGIN` of the least time; None if none runs."""
    times = {name: one.ms for name, one in tried.items() if one.ms is not None}
    return next((name for name, ms in times.items() if ms <= MARGIN * min(times.values())), None)


def choose_attention(config: Config, gather: Gather | None = None, timer: Timer = cuda_ms) -> str:
    """The backend of this run, which the log tells with its reason. Collective by `gather`; None: this process is alone.

    Raises ConfigError when the one asked for cannot run here.
    """
    model = config.model
    backend, why = attention_backend(model, config.precision)
    if model.attention == "auto":
        lacks = no_kernels_for(model, config.precision)
        missing = [one for one in (gather(lacks) if gather else [lacks]) if one is not None]
        if missing:  # on any rank: they measure together, or none does
            backend, why = "sdpa", f"auto: {missing[0]}"
        elif torch.are_deterministic_algorithms_enabled():
            why += "; not measured, with training.deterministic"
        elif model.sliding_window is not None:
            why += "; not measured, with a sliding window"
        else:
            backend, why = _measured(config, gather, timer)
    log.info("attention: %s (%s)", backend, why)
    return backend


def _measured(config: Config, gather: Gather | None, timer: Timer) -> tuple[str, str]:
    shape = shape_of(config)
    mine = try_all(shape, PRECISIONS[config.precision], own_device(), config.training.compile, timer)
    torch.cuda.empty_cache()  # or what was measured would lie between the model's parts
    found = agreed(gather(mine) if gather else [mine])
    rows, segments = fastest(found["rows"]), fastest(found["segments"])
    backend = backend_name(rows, segments) if rows and segments else "sdpa"
    chosen = fastest(found.get("chosen", {}))
    if chosen and segments and (other := backend_name(chosen, segments)) != backend:
        backend = f"{backend}/{other}"
    titles = {"chosen": f"rows of {shape.chosen} chosen tokens"}
    told = "; ".join(
        f"{titles.get(case, case)}: " + ", ".join(f"{name} {one}" for name, one in tried.items())
        for case, tried in found.items()
    )
    return backend, f"auto: measured at {shape.rows} x {shape.length} tokens; {told}"
