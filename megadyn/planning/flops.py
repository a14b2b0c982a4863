"""Floating-point operations of the model, a multiply-add counted as two.

Matrix products and attention only; causal attention counted at half, as Megatron-LM does. A training step
costs three forward passes (arXiv 2001.08361), or four where activations are recomputed, which is not counted
as useful work.
"""

from megadyn.config import ModelConfig


def block_flops(model: ModelConfig, tokens: float) -> float:
    """Forward operations of one dense layer on a sequence of `tokens`."""
    assert model.head_dim and model.num_kv_heads and model.ffn_size
    d, heads, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    projections = 2 * tokens * d * (2 * heads + 2 * kv)
    attention = 2 * 2 * tokens * tokens * heads / 2
    return projections + attention + 2 * tokens * d * model.ffn_size * 3


def layer_costs(model: ModelConfig, length: int) -> list[float]:
    """Forward operations of each layer on one sequence of `length` tokens at the configured capacity."""
    kept = max(1, int(model.routing.capacity * length))
    # The prior runs twice: once for the routing score, once on detached inputs for its own loss.
    prior = 2 * 2 * length * model.hidden_size * model.prior_size * 3
    of = {"dense": block_flops(model, length), "dtf_decision": block_flops(model, length) + prior,
          "dtf_dynamic": block_flops(model, kept)}
    return [of[kind] for kind in model.layer_types]


def head_flops(model: ModelConfig, length: int) -> float:
    """Forward operations of the vocabulary head on one sequence."""
    assert model.vocab_size
    return 2 * length * model.hidden_size * model.vocab_size


def training_flops(model: ModelConfig, length: int) -> float:
    """Operations of forward and backward on one sequence of `length` tokens."""
    return 3 * (sum(layer_costs(model, length)) + head_flops(model, length))
