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
        """The dimension along which `name` is cut; None if every rank holds it whole."""
        kind = next((kind for pattern, kind in TABLE if pattern.search(name)), "replicated")
        if self.size == 1 or kind == "replicated" or (kind == "kv" and self.kv_is_whole):
            return None
        return 1 if kind == "row" else 0

    def cut(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """This rank's part of `whole`; padding rows of the vocabulary are zero. A view if no padding is needed."""
        dim = self.dim(name)
        if dim is None:
            return whole
        short = -whole.shape[dim] % self.size
        if short:
            assert dim == 0 and TABLE[0][0].search(name), (
                f"{name} {tuple(whole.shape)} does not divide by {self.size}"
            )
            whole = torch.cat([whole, whole.new_zeros(short, *whole.shape[1:])])
        return whole.chunk(self.size, dim)[rank]

    def uncut(self, name: str, parts: Sequence[Tensor], vocab_size: int) -> Tensor:
        """The whole tensor from the parts of all ranks, without vocabulary padding. The inverse of `cut`."""
        dim = self.dim(name)
        if dim is None:
            return parts[0]
        whole = torch.cat(list(parts), dim)
        return whole[:vocab_size] if TABLE[0][0].search(name) else whole
