"""Floating-point operations of the model, summed from the pieces in `costs/operations.py`. A multiply-add counts as two.

Only matrix products and attention are counted, causal attention at half, as Megatron-LM does. A training step costs
three forward passes (arXiv 2001.08361). Recomputing activations costs a fourth, which is not counted as useful work.
Document masks inside a sample are ignored.
"""

from collections.abc import Mapping
from dataclasses import replace

from megadyn.config import ModelConfig
from megadyn.costs.operations import LayerFlops, seen_share
from megadyn.costs.shape import Shape
from megadyn.kinds import make_kind

Shares = Mapping[int, float]
"""Layer -> share of tokens that it took, for kinds where the tokens decide how many are taken (`Kind.varies`)."""


def layer_flops(model: Shape, length: int, shares: Shares | None = None) -> list[LayerFlops]:
    """Operations of each layer on one sequence of `length` tokens, at the planned share of tokens or at measured `shares`.

    A sliding window leaves the part of attention that it sees.
    If sequences take different numbers of tokens, attention really costs a little more, because it is quadratic.
    """
    routing = model.routing
    seen = shares if shares and routing.varies else {}
    return [
        routing.flops(layer, model, length, seen.get(index)).seeing(seen_share(model, index, length))
        for index, layer in enumerate(model.layer_types)
    ]


def layer_costs(model: Shape, length: int) -> list[float]:
    """Forward operations of each layer on one sequence, summed over tensor ranks without counting replicated work twice."""
    return [layer.total for layer in layer_flops(model, length)]


def head_flops(model: Shape, length: int) -> float:
    """Forward operations of the vocabulary head on one sequence."""
    assert model.vocab_size
    return 2 * length * model.hidden_size * model.vocab_size


def training_flops(
    model: Shape, length: int, shares: Shares | None = None, *, whole_square: bool = False
) -> float:
    """Forward and backward operations on one sequence of `length` tokens. `whole_square` counts causal attention in
    full, as llm-foundry, nanotron and torchtitan do."""
    layers = layer_flops(model, length, shares)
    unseen = sum(layer.attention for layer in layers) if whole_square else 0.0
    return 3 * (sum(layer.total for layer in layers) + unseen + head_flops(model, length)) - sum(
        layer.detached for layer in layers
    )


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The same model without routing: every layer processes every token."""
    return replace(model, routing=make_kind("dense"))
