"""Floating-point operations of the model, a multiply-add counted as two, from the pieces in `costs/operations.py`.

Matrix products and attention only; causal attention counted at half, as Megatron-LM does. A training step
costs three forward passes (arXiv 2001.08361), or four where activations are recomputed, which is not counted
as useful work. Documents masked inside a sample are not counted as shorter.
"""

from collections.abc import Mapping
from dataclasses import replace

from megadyn.config import ModelConfig
from megadyn.costs.operations import LayerFlops
from megadyn.costs.shape import Shape
from megadyn.kinds import make_kind

Shares = Mapping[int, float]
"""By layer, the share of tokens that it took, where how many follows from the tokens (`Kind.varies`)."""


def layer_flops(model: Shape, length: int, shares: Shares | None = None) -> list[LayerFlops]:
    """Of each layer, on one sequence of `length` tokens at the planned share of tokens, or at the measured `shares`.

    Where sequences differ in what they take, the square of attention is a little more than this.
    """
    routing = model.routing
    seen = shares if shares and routing.varies else {}
    return [
        routing.flops(layer, model, length, seen.get(index)) for index, layer in enumerate(model.layer_types)
    ]


def layer_costs(model: Shape, length: int) -> list[float]:
    """Forward operations of each layer on one sequence, on all tensor ranks together but counted once."""
    return [layer.total for layer in layer_flops(model, length)]


def head_flops(model: Shape, length: int) -> float:
    """Forward operations of the vocabulary head on one sequence."""
    assert model.vocab_size
    return 2 * length * model.hidden_size * model.vocab_size


def training_flops(
    model: Shape, length: int, shares: Shares | None = None, *, whole_square: bool = False
) -> float:
    """Operations of forward and backward on one sequence of `length` tokens; `whole_square` counts causal attention in full, as
    llm-foundry, nanotron and torchtitan do."""
    layers = layer_flops(model, length, shares)
    unseen = sum(layer.attention for layer in layers) if whole_square else 0.0
    return 3 * (sum(layer.total for layer in layers) + unseen + head_flops(model, length)) - sum(
        layer.detached for layer in layers
    )


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The same model with every token in every layer."""
    return replace(model, routing=make_kind("dense"))
