"""The sizes of a model that costs depend on."""

from typing import Any, Protocol


class Shape(Protocol):
    """The completed `ModelConfig`, as far as cost formulas read it. Its `routing` is a `Kind`, which this package must
    not import."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None
    head_dim: int | None
    ffn_size: int | None
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    logit_softcap: float | None
    normalization: str
    vocab_size: int | None
    tie_embeddings: bool
    routing: Any

    def window_of(self, layer: int) -> int | None: ...

    @property
    def layer_types(self) -> list[str]: ...


def capacity_count(capacity: float, length: int) -> int:
    """k = max(1, floor(capacity * T)): how many of a sequence's `length` tokens top-k chooses."""
    return max(1, int(capacity * length))
