"""Bytes that a layer moves between tensor ranks, forward and backward: in proportion to the tokens that it processes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.model.block import Stream
from megadyn.network import KINDS as LAYERS
from megadyn.parallel.grid import Axis, make_grid
from megadyn.parallel.mappings import own_part
from megadyn.routing.aux_loss import LossScale
from tests.networks import layer_context, with_routing
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

BATCH, LENGTH, WIDTH, CAPACITY = 2, 512, 64, 0.25
MOVED: dict[str, Callable[[Any, int], float]] = {
    "all_reduce": lambda x, ranks: 2 * (ranks - 1) / ranks * x.numel(),
    "all_gather": lambda parts, ranks: (ranks - 1) * parts[0].numel(),
    "reduce_scatter": lambda out, ranks: (ranks - 1) * out.numel(),
}
"""Numbers that each rank sends in a ring, by the collective's first argument."""


def test_bytes_moved():
    run_on_ranks(check, 2)


def check() -> None:
    """In units of [B, T, D] sent around once. Beside hidden states go scores [B, T] and gradients of replicated weights [D]."""
    tp = make_grid(2, 1).tp
    # dense: 2 all-reduces forward, 2 backward; under sequence parallelism each becomes a gather and a scatter.
    dense = {split: units(tp, "dense", split) for split in (False, True)}
    assert dense[False] == 4
    assert dense[True] == pytest.approx(4, abs=0.05)
    for kind in ("dtf", "mod"):
        # of the chosen tokens: the same 4; under sequence parallelism 1 more to bring them together, 1 for their gradients.
        assert units(tp, kind, False) == pytest.approx(4 * CAPACITY)
        assert units(tp, kind, True) == pytest.approx(6 * CAPACITY, abs=0.05)
    for split in (False, True):          # every token keeps its MLP and its bypass
        assert units(tp, "dtrnet-expert", split) == pytest.approx(4, abs=0.1)


def units(tp: Axis, kind: str, split: bool) -> float:
    config = with_routing(tiny_config(kind, hidden_size=WIDTH, num_layers=4), capacity=CAPACITY)
    config.parallel.sequence = split
    name = {"dense": "dense", "dtf": "dtf_dynamic", "mod": "mod", "dtrnet-expert": "dtrnet"}[kind]
    ctx = layer_context(config, tp)
    layer = LAYERS[name](ctx, 1) if kind == "dense" else LAYERS[name](ctx, 1, LossScale())
    hidden = own_part(torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64), ctx.make.seq).clone().requires_grad_()
    gate = torch.rand(hidden.shape[:2], dtype=torch.float64).requires_grad_() if kind == "dtf" else None
    sent = [0.0]
    originals = {name: getattr(dist, name) for name in MOVED}

    def counting(name: str) -> Callable[..., Any]:
        def collective(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            sent[0] += MOVED[name](first, tp.size)
            return originals[name](first, *args, **kwargs)
        return collective

    for name in MOVED:
        setattr(dist, name, counting(name))
    try:
        layer(Stream(hidden, gate)).hidden.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return sent[0] / (2 * (tp.size - 1) / tp.size * math.prod((BATCH, LENGTH, WIDTH)))
