"""Matrices put together on one rank each, and handed back: what every rank gets is its piece of the whole result."""

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.parallel.grid import make_grid
from megadyn.parallel.sharding import Sharding
from megadyn.parallel.whole import Exchange, Matrix, Stage, pieces_of_all, stage_group
from tests.helpers.ranks import run_on_ranks

LAYER = "model.layers.0"
SHAPES = {
    f"{LAYER}.self_attn.q_proj.weight": (8, 6),  # rows are cut
    f"{LAYER}.mlp.down_proj.weight": (5, 16),  # columns are cut
    f"{LAYER}.self_attn.k_proj.weight": (
        4,
        6,
    ),  # whole on each of four tensor ranks, which share two heads
    f"{LAYER}.mlp.up_proj.weight": (16, 6),
}
CASES = [
    (tensor, pipeline, copied, torch.float64)
    for tensor, pipeline in ((2, 2), (4, 1), (1, 2), (8, 1))
    for copied in (False, True)
] + [(4, 1, False, torch.bfloat16)]
"""On eight ranks: the stages' groups are one of tensor and data-parallel ranks, all ranks, and those of one axis."""


def squared(whole: Tensor) -> Tensor:
    """Depends on every element at once, and on where each is."""
    return whole @ whole.T @ whole


def cuts_of(elements: int, ranks: int) -> list[int]:
    """Uneven; one rank of four has nothing."""
    return {1: [0, elements], 2: [0, 5, elements], 4: [0, 3, 11, 11, elements]}[ranks]


def check(cases: list[tuple[int, int, bool, torch.dtype]]) -> None:
    for tensor, pipeline, copied, dtype in cases:
        check_one(tensor, pipeline, copied, dtype)


def check_one(tensor: int, pipeline: int, copied: bool, dtype: torch.dtype) -> None:
    grid = make_grid(tensor, pipeline)
    stage = Stage(grid, Sharding(tensor, 2), stage_group(grid), copied, torch.device("cpu"))
    draw = torch.Generator().manual_seed(grid.pp.rank)
    wholes = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }
    parts = {name: stage.sharding.cut(name, whole, grid.tp.rank) for name, whole in wholes.items()}
    places = []
    for part in parts.values():
        cuts = cuts_of(part.numel(), grid.dp.size)
        first, stop = (0, part.numel()) if copied else cuts[grid.dp.rank : grid.dp.rank + 2]
        places.append((first, stop - first))
    matrices = [
        Matrix(name, tuple(parts[name].shape), SHAPES[name], pieces)
        for name, pieces in zip(parts, pieces_of_all(places, grid), strict=True)
    ]
    exchange = Exchange(matrices, [(3 * i + 1) % stage.size for i in range(len(matrices))], stage, dtype)
    made = []

    def function(whole: Tensor) -> Tensor:
        made.append(whole)
        return squared(whole)

    given = {
        name: part.reshape(-1)[first : first + size]
        for (name, part), (first, size) in zip(parts.items(), places, strict=True)
    }
    got = exchange.apply([given[matrix.name] for matrix in exchange.matrices], function)
    for matrix, piece in zip(exchange.matrices, got, strict=True):
        first, size = places[list(parts).index(matrix.name)]
        want = stage.sharding.cut(matrix.name, squared(wholes[matrix.name]), grid.tp.rank).reshape(-1)
        assert torch.equal(piece, want[first : first + size]), (matrix.name, tensor, pipeline, copied)
    count = torch.tensor(len(made))
    dist.all_reduce(count)
    assert int(count) == len(SHAPES) * pipeline  # each once in its stage


def test_every_rank_gets_its_piece_of_the_whole_result() -> None:
    run_on_ranks(check, 8, CASES)
