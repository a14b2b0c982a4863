"""Floating-point operations of the model, a multiply-add counted as two.

Matrix products and attention only; causal attention counted at half, as Megatron-LM does. A training step
costs three forward passes (arXiv 2001.08361), or four where activations are recomputed, which is not counted
as useful work.
"""

from typing import NamedTuple

from megadyn.config import ModelConfig, capacity_count


def block_flops(model: ModelConfig, tokens: float, attending: float | None = None) -> float:
    """Forward operations of one block on `tokens` of a sequence, `attending` of which (default: all) query and are seen.

    The others of a DTRNet layer have a value and an output projection, and their MLP.
    """
    assert model.head_dim and model.num_kv_heads and model.ffn_size
    attending = tokens if attending is None else attending
    d, heads, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    values_outputs = 2 * tokens * d * (heads + kv)
    queries_keys = 2 * attending * d * (heads + kv)
    attention = 2 * 2 * attending * attending * heads / 2
    return values_outputs + queries_keys + attention + 2 * tokens * d * model.ffn_size * 3


class LayerFlops(NamedTuple):
    """Forward operations of one layer on one sequence."""

    cut: float
    """Shared out over tensor ranks."""
    whole: float
    """Done by every tensor rank alike: routers, predictors, priors."""


def layer_flops(model: ModelConfig, length: int) -> list[LayerFlops]:
    """Of each layer, on one sequence of `length` tokens at the configured capacity.

    DTRNet's token choice has no fixed capacity: there `model.routing.capacity` is the share expected to attend.
    """
    d, kept = model.hidden_size, capacity_count(model.routing.capacity or 1.0, length)
    prior = 2 * length * d * model.prior_size * 3
    predictor = 2 * length * (d * (d // 2) + d // 2) if model.routing.causal == "predictor" else 0
    of = {"dense": LayerFlops(block_flops(model, length), 0),
          "dtf_decision": LayerFlops(block_flops(model, length), prior),
          "dtf_dynamic": LayerFlops(block_flops(model, kept), predictor),
          "mod": LayerFlops(block_flops(model, kept), predictor + 2 * length * d),
          "dtrnet": LayerFlops(block_flops(model, length, kept), 2 * length * (d * (d // 2) + d))}
    return [of[kind] for kind in model.layer_types]


def attention_flops(model: ModelConfig, length: int) -> list[float]:
    """Of each layer, what `layer_flops` counts for scores and averages: half of the square, as attention is causal."""
    assert model.head_dim
    kept = capacity_count(model.routing.capacity or 1.0, length)
    seen = [length if kind in ("dense", "dtf_decision") else kept for kind in model.layer_types]
    return [2 * 2 * tokens * tokens * model.num_heads * model.head_dim / 2 for tokens in seen]


def layer_costs(model: ModelConfig, length: int) -> list[float]:
    """Forward operations of each layer on one sequence, on all tensor ranks together but counted once."""
    return [sum(layer) for layer in layer_flops(model, length)]


def head_flops(model: ModelConfig, length: int) -> float:
    """Forward operations of the vocabulary head on one sequence."""
    assert model.vocab_size
    return 2 * length * model.hidden_size * model.vocab_size


def training_flops(model: ModelConfig, length: int) -> float:
    """Operations of forward and backward on one sequence of `length` tokens."""
    return 3 * (sum(layer_costs(model, length)) + head_flops(model, length))
