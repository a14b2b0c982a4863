"""Parameter counts of the model and of each rank, in closed form."""

from collections.abc import Sequence
from itertools import pairwise

from megadyn.costs.shape import Shape


def layer_parameters(model: Shape, tensor: int = 1) -> list[int]:
    """Parameters per transformer layer on one of `tensor` ranks (with one rank: all)."""
    assert model.head_dim and model.num_kv_heads and model.ffn_size
    d, head = model.hidden_size, model.head_dim
    # Key/value heads are cut over tensor ranks if there are enough of them; otherwise each rank holds all.
    keys = model.num_kv_heads // tensor if model.num_kv_heads >= tensor else model.num_kv_heads
    heads = model.num_heads // tensor
    block = d * head * (2 * heads + 2 * keys) + 3 * d * model.ffn_size // tensor
    block += head * (heads + 2 * keys) if model.qkv_bias else 0
    block += d if model.output_bias else 0
    block += 2 * head if model.qk_norm else 0
    block += d + 3 * head if model.normalization == "hybridnorm" else 2 * d
    return [block + model.routing.parameters(layer, model) for layer in model.layer_types]


def vocabulary_rows(model: Shape, tensor: int) -> int:
    """Rows of the embedding, and of the head, on one of `tensor` ranks, including padding."""
    assert model.vocab_size
    return -(-model.vocab_size // tensor)


def total_parameters(model: Shape) -> int:
    """Parameters of the whole model, each counted once, without padding."""
    assert model.vocab_size
    words = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return sum(layer_parameters(model)) + words + model.hidden_size


def stage_parameters(model: Shape, tensor: int, cuts: Sequence[int]) -> list[int]:
    """Parameters on one tensor rank of each pipeline stage. A tied embedding is on the first and on the last stage.

    Args:
        cuts: stages as boundaries between layers, from `balanced_stages`.
    """
    layers = layer_parameters(model, tensor)
    stages = [sum(layers[a:b]) for a, b in pairwise(cuts)]
    words = vocabulary_rows(model, tensor) * model.hidden_size
    stages[0] += words
    stages[-1] += model.hidden_size + (0 if model.tie_embeddings and len(stages) == 1 else words)
    return stages
