"""Floating-point operations of the model, a multiply-add counted as two.

Matrix products and attention only; causal attention counted at half, as Megatron-LM does. A training step
costs three forward passes (arXiv 2001.08361), or four where activations are recomputed, which is not counted
as useful work. Documents masked inside a sample are not counted as shorter.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from megadyn.config import ModelConfig, RoutingConfig, capacity_count

Shares = Mapping[int, float]
"""By layer, the share of tokens that attends in it where each token chooses for itself; elsewhere the planned share counts."""


def block_flops(model: ModelConfig, tokens: float, attending: float | None = None) -> float:
    """Forward operations of one block on `tokens` of a sequence, `attending` of which (default: all) query and are seen.

    The others of a DTRNet layer have a value and an output projection, and their MLP.
    """
    assert model.head_dim and model.num_kv_heads
    attending = tokens if attending is None else attending
    d, heads, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    values_outputs = 2 * tokens * d * (heads + kv)
    queries_keys = 2 * attending * d * (heads + kv)
    attention = 2 * 2 * attending * attending * heads / 2
    return values_outputs + queries_keys + attention + mlp_flops(model, tokens)


def mlp_flops(model: ModelConfig, tokens: float) -> float:
    """Forward operations of one MLP on `tokens`."""
    assert model.ffn_size
    return 2 * tokens * model.hidden_size * model.ffn_size * 3


class LayerFlops(NamedTuple):
    """Forward operations of one layer on one sequence."""

    cut: float
    """Shared out over tensor ranks."""
    whole: float
    """Done by every tensor rank alike: routers, predictors, priors."""


def layer_flops(model: ModelConfig, length: int, shares: Shares | None = None) -> list[LayerFlops]:
    """Of each layer, on one sequence of `length` tokens at the configured capacity.

    DTRNet's token choice has no fixed capacity: there `model.routing.planned_share` is expected to attend, and `shares` are
    those that did (of sequences alike; where they differ, the square of attention is a little more).
    """
    d, kept = model.hidden_size, capacity_count(model.routing.planned_share, length)
    chosen = _chosen(model, length, shares)
    prior = 2 * length * d * model.prior_size * 3
    predictor = 2 * length * (d * (d // 2) + d // 2) if model.routing.causal == "predictor" else 0
    of = {"dense": LayerFlops(block_flops(model, length), 0),
          "dtf_decision": LayerFlops(block_flops(model, length), prior),
          "dtf_dynamic": LayerFlops(block_flops(model, kept), predictor),
          "mod": LayerFlops(block_flops(model, kept), predictor + 2 * length * d)}
    router = 2 * length * (d * (d // 2) + d)
    return [LayerFlops(block_flops(model, length, chosen[i]), router) if kind == "dtrnet" else of[kind]
            for i, kind in enumerate(model.layer_types)]


def _chosen(model: ModelConfig, length: int, shares: Shares | None) -> list[float]:
    """Of each layer, how many of a sequence's tokens its routing takes."""
    kept = capacity_count(model.routing.planned_share, length)
    known = shares if shares and model.routing.is_token_choice else {}
    return [known[i] * length if i in known else kept for i in range(model.num_layers)]


def attention_flops(model: ModelConfig, length: int, shares: Shares | None = None) -> list[float]:
    """Of each layer, what `layer_flops` counts for scores and averages: half of the square, as attention is causal."""
    assert model.head_dim
    seen = [length if kind in ("dense", "dtf_decision") else chosen
            for kind, chosen in zip(model.layer_types, _chosen(model, length, shares), strict=True)]
    return [2 * 2 * tokens * tokens * model.num_heads * model.head_dim / 2 for tokens in seen]


def layer_costs(model: ModelConfig, length: int) -> list[float]:
    """Forward operations of each layer on one sequence, on all tensor ranks together but counted once."""
    return [sum(layer) for layer in layer_flops(model, length)]


def head_flops(model: ModelConfig, length: int) -> float:
    """Forward operations of the vocabulary head on one sequence."""
    assert model.vocab_size
    return 2 * length * model.hidden_size * model.vocab_size


def training_flops(model: ModelConfig, length: int, shares: Shares | None = None, *, whole_square: bool = False) -> float:
    """Operations of forward and backward on one sequence of `length` tokens; `whole_square` counts causal attention in full, as
    llm-foundry, nanotron and torchtitan do."""
    layers = sum(sum(layer) for layer in layer_flops(model, length, shares))
    unseen = sum(attention_flops(model, length, shares)) if whole_square else 0.0
    return 3 * (layers + unseen + head_flops(model, length))


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The same model with every token in every layer."""
    return replace(model, routing=RoutingConfig(kind="dense", capacity=1.0))
