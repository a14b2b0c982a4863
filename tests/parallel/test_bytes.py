"""Bytes that a layer moves between tensor ranks, forward and backward: in proportion to the tokens that it processes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.model.block import Stream
from megadyn.parallel.grid import Axis, make_grid
from megadyn.parallel.mappings import GATHER, SCATTER, own_part
from tests.helpers.networks import known, layer_context, make_layer, with_routing
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import tiny_config

BATCH, LENGTH, WIDTH, CAPACITY = 2, 512, 64, 0.25
MOVED: dict[str, Callable[[Any, int], float]] = {
    "all_reduce": lambda x, ranks: 2 * (ranks - 1) / ranks * x.numel(),
    GATHER: lambda parts, ranks: (ranks - 1) / ranks * parts.numel(),
    SCATTER: lambda out, ranks: (ranks - 1) * out.numel(),
}
"""Numbers that each rank sends in a ring, by the collective's first argument."""


def test_bytes_moved():
    run_on_ranks(check, 2)


def check() -> None:
    """In units of [B, T, D] sent around once. Under sequence parallelism come scores [B, T] and, as each rank sees a part of the
    tokens, the gradients of weights that all ranks hold whole."""
    tp = make_grid(2, 1).tp
    unit, scores = BATCH * LENGTH * WIDTH, 1 / (2 * WIDTH)
    # dense: 2 all-reduces forward, 2 backward; under sequence parallelism each becomes a gather and a scatter.
    assert units(tp, "dense", split=False) == 4
    assert units(tp, "dense", split=True) == pytest.approx(4 + 2 * WIDTH / unit)
    # Of the chosen tokens the same; under sequence parallelism 1 more to bring them together, 1 for their gradients.
    for name, whole in (("dtf_dynamic", 0), ("mod", WIDTH)):
        assert units(tp, name, split=False) == pytest.approx(4 * CAPACITY)
        assert units(tp, name, split=True) == pytest.approx(6 * CAPACITY + scores + whole / unit)
    # Every token keeps its MLP and its bypass.
    router = WIDTH * WIDTH // 2 + WIDTH // 2 + WIDTH + 2
    assert units(tp, "dtrnet", split=False) == pytest.approx(4)
    assert units(tp, "dtrnet", split=True) == pytest.approx(4 + scores + (2 * WIDTH + router) / unit)
    prior = 3 * WIDTH * 4 + WIDTH
    assert units(tp, "dtf_decision", split=False) == pytest.approx(4)
    assert units(tp, "dtf_decision", split=True) == pytest.approx(4 + scores + (2 * WIDTH + prior + 4) / unit)


def units(tp: Axis, name: str, split: bool) -> float:
    kind = {"dtrnet": "dtrnet-expert"}.get(name, name.split("_")[0])
    config = tiny_config(kind, hidden_size=WIDTH, num_layers=4)
    config = with_routing(config, **known(config, capacity=CAPACITY))
    config.parallel.sequence = split
    ctx = layer_context(config, tp)
    layer = make_layer(config, config.model.layer_types.index(name), tp=tp)
    hidden = (
        own_part(torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64), ctx.make.seq)
        .clone()
        .requires_grad_()
    )
    score = (
        torch.rand(hidden.shape[:2], dtype=torch.float64).requires_grad_() if name == "dtf_dynamic" else None
    )
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
        out = layer(Stream(hidden, score))
        (out.hidden.sum() + (out.score.sum() if out.score is not None else 0)).backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return sent[0] / (2 * (tp.size - 1) / tp.size * math.prod((BATCH, LENGTH, WIDTH)))
