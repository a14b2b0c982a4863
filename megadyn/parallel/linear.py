"""Linear layers and the embedding, cut over tensor ranks: each is the plain layer plus one line. Also small linear
layers that are not cut."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import copy_to_tp, leave_tp
from megadyn.parallel.params import Init, ParamMaker, constant


class _Linear(nn.Module):
    """W [F, D] and an optional bias [F], as `make` cuts them."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        make: ParamMaker,
        init: Init,
        bias: bool = False,
    ):
        super().__init__()
        self.tp, self.seq = make.tp, make.seq
        self.weight = make(f"{name}.weight", (out_features, in_features), init)
        self.bias = make(f"{name}.bias", (out_features,), constant(0.0)) if bias else None


class ColumnParallelLinear(_Linear):
    """y = x W^T + b with W [F, D] cut along its outputs (arXiv 1909.08053, section 3): x [..., D] -> [..., F/tp]. The
    caller must pass x through `enter_tp` first, once for all layers that use it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class KeyValueLinear(ColumnParallelLinear):
    """Key or value projection, W [heads * head_dim, D].

    With at least as many heads as ranks, it is an ordinary column cut. With fewer, every rank holds the whole weight
    and computes the one head that its query heads use. The weight's gradient is then summed over the ranks, so it is
    equal on all of them; the parameter counts once. x [..., D] -> [..., max(heads / tp, 1) * head_dim].
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        heads: int,
        head_dim: int,
        *,
        make: ParamMaker,
        init: Init,
        bias: bool,
    ):
        super().__init__(name, in_features, heads * head_dim, make=make, init=init, bias=bias)
        self.rows: slice | None = None
        if make.sharding.kv_is_whole:
            head = make.tp.rank * heads // make.tp.size
            self.rows = slice(head * head_dim, (head + 1) * head_dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return super().forward(x)
        bias = None if self.bias is None else copy_to_tp(self.bias, self.tp)[self.rows]
        return F.linear(x, copy_to_tp(self.weight, self.tp)[self.rows], bias)


class RowParallelLinear(_Linear):
    """y = x W^T + b with W [D, F] cut along its inputs: each rank holds one term of the sum. x [B, T, F/tp] -> [B, T/seq, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.sum_of(self.term(x))

    def term(self, x: Tensor) -> Tensor:
        """This rank's term of the sum."""
        return F.linear(x, self.weight)

    def sum_of(self, term: Tensor) -> Tensor:
        """The sum of all ranks' terms [B, T, D], and the bias; this rank takes its part of the sequence: [B, T/seq, D]."""
        total = leave_tp(term, self.tp, self.seq)
        # after the sum: before it, the bias would count once for each rank
        return total if self.bias is None else total + copy_to_tp(self.bias, self.seq)


class VocabParallelEmbedding(nn.Module):
    """Embedding rows [V, D] cut over the vocabulary. A rank looks up its own rows; others give zeros. [B, T] -> [B, T/seq, D].

    An id outside the vocabulary gives NaN on every rank, without waiting for the device. Then the loss is NaN, and the
    rule for bad steps keeps the step out of the weights. This includes ids in the last rank's padding.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, *, make: ParamMaker, init: Init):
        super().__init__()
        self.tp: Axis = make.tp
        self.seq: Axis = make.seq
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // make.tp.size)
        self.weight = make(f"{name}.weight", (vocab_size, hidden_size), init)  # [V/tp, D]

    def forward(self, tokens: Tensor) -> Tensor:
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if self.tp.size == 1:
            found = F.embedding(tokens.masked_fill(outside, 0), self.weight)
            return found.masked_fill_(outside.unsqueeze(-1), math.nan)
        local = tokens - self.tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        found.masked_fill_(elsewhere.unsqueeze(-1), 0).masked_fill_(outside.unsqueeze(-1), math.nan)
        return leave_tp(found, self.tp, self.seq)


def upcast(x: Tensor) -> Tensor:
    """Float32 or wider: half precision is widened, float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Projection(nn.Module):
    """x W^T + b in float32 or wider, with W and b not cut over tensor ranks, x [B, T/seq, D]. Half precision would
    change one decision in a thousand, and may give a bias's gradient the wrong sign."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, *, seq: Axis):
        super().__init__()
        self.weight, self.bias, self.seq = weight, bias, seq

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else upcast(copy_to_tp(self.bias, self.seq))
        return F.linear(upcast(x), upcast(copy_to_tp(self.weight, self.seq)), bias)
