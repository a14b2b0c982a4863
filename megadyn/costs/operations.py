"""Floating-point operations of the pieces of a layer. A multiply-add counts as two.

Only matrix products and attention are counted, causal attention at half, as Megatron-LM does.
"""

from typing import NamedTuple

from megadyn.costs.shape import Shape


def seen_share(shape: Shape, layer: int, length: int) -> float:
    """Share of causal attention's half square that a layer's sliding window leaves of sequences of `length` tokens, and so of
    tokens spread evenly over them."""
    window = shape.window_of(layer)
    return 1.0 if window is None or window >= length else 1 - (1 - window / length) ** 2


class LayerFlops(NamedTuple):
    """Forward operations of one layer on one sequence."""

    cut: float
    """Split over tensor ranks."""
    whole: float
    """Repeated on every tensor rank: routers, predictors, priors."""
    attention: float
    """The part of `cut` for attention's scores and averages, half of the square."""
    detached: float = 0.0
    """The part of `whole` that sends no gradient to its input, so its backward pass costs one forward pass, not two."""

    def seeing(self, share: float) -> "LayerFlops":
        """With this share of attention's scores and averages."""
        return self._replace(cut=self.cut - (1 - share) * self.attention, attention=share * self.attention)

    @property
    def total(self) -> float:
        """All tensor ranks together; repeated work counts once."""
        return self.cut + self.whole


def attention_flops(shape: Shape, attending: float) -> float:
    """Scores and averages of `attending` tokens among themselves: half of the square, because attention is causal."""
    assert shape.head_dim
    return 2 * 2 * attending * attending * shape.num_heads * shape.head_dim / 2


def mlp_flops(shape: Shape, tokens: float) -> float:
    """One MLP on `tokens`."""
    assert shape.ffn_size
    return 2 * tokens * shape.hidden_size * shape.ffn_size * 3


def block_flops(shape: Shape, tokens: float, attending: float | None = None) -> float:
    """One block on `tokens` of a sequence. `attending` of them (default: all) have a query and a key; every token has a
    value, an output projection and its MLP."""
    assert shape.head_dim and shape.num_kv_heads
    attending = tokens if attending is None else attending
    d, heads, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    values_outputs = 2 * tokens * d * (heads + kv)
    queries_keys = 2 * attending * d * (heads + kv)
    return values_outputs + queries_keys + attention_flops(shape, attending) + mlp_flops(shape, tokens)


def flops_of_layer(
    shape: Shape, tokens: float, attending: float | None = None, *, whole: float = 0.0, detached: float = 0.0
) -> LayerFlops:
    """A layer whose block runs on `tokens`; `whole` and `detached` as in LayerFlops."""
    seen = tokens if attending is None else attending
    return LayerFlops(
        block_flops(shape, tokens, attending), whole + detached, attention_flops(shape, seen), detached
    )


def router_flops(shape: Shape, length: int, outputs: int = 1) -> float:
    """A two-layer router d -> d/2 -> `outputs` on `length` tokens."""
    d = shape.hidden_size
    return 2 * length * (d * (d // 2) + outputs * (d // 2))
