"""What Muon costs: operations of the Newton-Schulz iteration, bytes between ranks, memory. A multiply-add counts as two.

`engine/muon.py` puts every matrix together on one rank of its pipeline stage, in rounds of matrices of similar cost.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from megadyn.config import Config
from megadyn.costs.shape import Shape


def orthogonalisation_flops(rows: int, columns: int, steps: int) -> float:
    """`steps` Newton-Schulz steps on one matrix: two products with its smaller square, and that square's own."""
    small, large = sorted((rows, columns))
    return steps * (4.0 * small * small * large + 2.0 * small**3)


def block_matrices(model: Shape) -> list[tuple[int, int]]:
    """Shapes of the matrices of one block, whole: queries, keys, values, output, gate, up, down."""
    assert model.head_dim and model.num_kv_heads and model.ffn_size
    d, f = model.hidden_size, model.ffn_size
    heads, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return [(heads, d), (keys, d), (keys, d), (d, heads), (f, d), (f, d), (d, f)]


def matrix_parameters(model: Shape, tensor: int, layers: int) -> int:
    """Parameters under Muon on one of `tensor` ranks with this many layers. Few keys and values are whole on each rank."""
    assert model.num_kv_heads
    whole = model.num_kv_heads < tensor
    return layers * sum(
        rows * columns // (1 if whole and index in (1, 2) else tensor)
        for index, (rows, columns) in enumerate(block_matrices(model))
    )


def rank_flops(model: Shape, layers: int, ranks: int, steps: int) -> float:
    """Operations per step of the busiest of a stage's `ranks`, which share the matrices of `layers` layers."""
    shapes = Counter(block_matrices(model) * layers)
    return sum(
        math.ceil(count / ranks) * orthogonalisation_flops(*shape, steps) for shape, count in shapes.items()
    )


def rank_bytes(model: Shape, layers: int, tensor: int, data: int, number: int, *, copied: bool) -> float:
    """Bytes per step that a rank sends: its share of the updates to the owners, and as an owner the results to all.

    Args:
        number: bytes of one element as sent. copied: data-parallel ranks hold copies (ZeRO-0), not pieces.
    """
    ranks = tensor * data
    if ranks == 1:
        return 0.0
    # A rank needs no message for what it holds itself: of pieces one share in `ranks`, of copies its own tensor rank's part.
    own = 1 / tensor if copied else 1 / ranks
    whole = layers * sum(rows * columns for rows, columns in block_matrices(model))
    held = matrix_parameters(model, tensor, layers) * tensor * (data if copied else 1)
    return number * (whole * (1 - own) + held * (1 - 1 / ranks)) / ranks


def working_memory(model: Shape, number: int) -> float:
    """Bytes that a round takes on a rank: the packed updates, one whole matrix, what the iteration makes of it, the results.

    A round has at most as many elements as the largest matrix times the stage's ranks, so each rank packs and owns about one.
    """
    rows, columns = max(block_matrices(model), key=math.prod)
    small = min(rows, columns)
    return number * (6.0 * rows * columns + 2.0 * small * small)


def muon_number(config: Config) -> int:
    """Bytes of a number in Muon's iteration; 0 with another optimizer."""
    optimizer = config.optimizer
    if optimizer.name != "muon":
        return 0
    return 2 if optimizer.muon.iterates_in(config.precision) == "bf16" else 4


class Added(NamedTuple):
    """What Muon adds to a step on a rank of the largest stage, after gradients are reduced. Nothing overlaps with it."""

    flops: float
    sent: float
    """Bytes."""


def added_by_muon(config: Config, cuts: Sequence[int], zero_stage: int, data: int) -> Added:
    """`cuts`: stages as boundaries between layers; `data`: data-parallel ranks. Nothing with another optimizer."""
    if not (number := muon_number(config)):
        return Added(0.0, 0.0)
    model, tensor = config.model, config.parallel.tensor
    layers = max(stop - start for start, stop in pairwise(cuts))
    return Added(
        rank_flops(model, layers, tensor * data, config.optimizer.muon.steps),
        rank_bytes(model, layers, tensor, data, number, copied=zero_stage == 0),
    )
