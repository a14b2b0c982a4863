"""How each parameter is cut over tensor ranks: one table, keyed by the parameter's Hugging Face name.

Initialisation, checkpoints, export and gradient norms all read it.

    kind        cut along        parameters
    column      rows, dim 0      projections whose outputs are split: q, gate, up
    kv          rows, dim 0      k and v; not cut if there are fewer heads than ranks
    row         columns, dim 1   projections whose inputs are split: o, down
    vocab       rows, dim 0      embedding and head, padded with zero rows to a multiple of the tensor size
    replicated  not cut          everything else: norms, routers, priors
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TABLE = (
    (re.compile(r"(embed_tokens|lm_head)\.weight$"), "vocab"),
    (re.compile(r"self_attn\.[kv]_proj\.(weight|bias)$"), "kv"),
    (re.compile(r"(self_attn\.q_proj|mlp\.gate_proj|mlp\.up_proj)\.(weight|bias)$"), "column"),
    (re.compile(r"(self_attn\.o_proj|mlp\.down_proj)\.weight$"), "row"),
)


def kind_of(name: str) -> str:
    """Of the table, first column."""
    return next((kind for pattern, kind in TABLE if pattern.search(name)), "replicated")


def along(kind: str) -> int:
    """The dimension along which a kind is cut, if it is."""
    return 1 if kind == "row" else 0


@dataclass(frozen=True)
class Sharding:
    """The table for one model at one tensor size."""

    size: int
    kv_heads: int

    @property
    def kv_is_whole(self) -> bool:
        """Whether there are fewer key/value heads than tensor ranks: each rank then holds all and computes only the one
        it needs."""
        return self.kv_heads < self.size

    def dim(self, name: str) -> int | None:
        """The dimension along which `name` is cut, or None when every rank holds it whole."""
        kind = kind_of(name)
        if self.size == 1 or kind == "replicated" or (kind == "kv" and self.kv_is_whole):
            return None
        return along(kind)

    def bounds(self, name: str, shape: Sequence[int], rank: int) -> tuple[int, int, int]:
        """The dimension along which a tensor of this shape can be cut, and where this rank's part of it begins and ends. The
        last parts of a vocabulary may end beyond it, or begin there."""
        kind = kind_of(name)
        dim = along(kind)
        if self.dim(name) is None:
            return dim, 0, shape[dim]
        assert kind == "vocab" or shape[dim] % self.size == 0, (
            f"{name} {tuple(shape)} does not divide by {self.size}"
        )
        width = -(-shape[dim] // self.size)
        return dim, rank * width, (rank + 1) * width

    def cut(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """This rank's part of `whole`; vocabulary rows beyond the last are zero. A view where no padding is needed."""
        dim, first, stop = self.bounds(name, whole.shape, rank)
        held = whole.narrow(dim, min(first, whole.shape[dim]), max(0, min(stop, whole.shape[dim]) - first))
        short = stop - first - held.shape[dim]
        return torch.cat([held, whole.new_zeros(short, *whole.shape[1:])]) if short else held

    def uncut(self, name: str, parts: Sequence[Tensor], vocab_size: int) -> Tensor:
        """The whole tensor from the parts of all ranks, without vocabulary padding. The inverse of `cut`."""
        dim = self.dim(name)
        if dim is None:
            return parts[0]
        whole = torch.cat(list(parts), dim)
        return whole[:vocab_size] if TABLE[0][0].search(name) else whole
