"""Selects tokens, takes them out of their sequences, and puts updates back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadyn.kernels.rule import fused
from megadyn.model.block import Stream
from megadyn.model.documents import Segments, segments_of
from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import copy_to_tp, enter_tp, leave_tp, reduce_from_tp


class Selection(NamedTuple):
    """Tokens chosen from B sequences of T, in order. A place is an index into the B * T flattened tokens."""

    places: Tensor
    """[B, C] if every sequence contributes C tokens; [1, N], one sequence after another, if the numbers differ."""
    sequences: Tensor | None = None
    """[1, N]: the sequence of each token; None with places [B, C], where each row is a sequence."""


def choose_top(score: Tensor, count: int) -> Selection:
    """The `count` highest of score [B, T] in each sequence; the first one wins a tie."""
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    starts = torch.arange(score.shape[0], device=score.device).unsqueeze(1) * score.shape[1]
    return Selection(best + starts)


def choose_where(mask: Tensor) -> Selection:
    """The tokens where mask [B, T] is true. Waits for the device to learn their number."""
    places = mask.flatten().nonzero().view(1, -1)
    return Selection(places, places // mask.shape[1])


def take(x: Tensor, places: Tensor) -> Tensor:
    """x [B, T] or [B, T, D] at distinct places [b, c] -> [b, c] or [b, c, D]."""
    if x.ndim == 3 and fused(x):
        from megadyn.kernels.rows import take_rows

        return take_rows(x.flatten(0, 1), places.flatten()).unflatten(0, places.shape)
    return take_any(x, places)


def take_any(x: Tensor, places: Tensor) -> Tensor:
    """`take`, but places may repeat."""
    return x.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)


class _TakeOut(torch.autograd.Function):
    """Combines both gradients in one copy: it needs no zero tensor, and copies rows instead of adding them, because
    places are distinct (on a CPU, index_add takes ten times as long)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places)
        return x.view_as(x), take(x, places)

    @staticmethod
    def backward(ctx: Any, grad_all: Tensor, grad_taken: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _with_added(grad_all, places, grad_taken), None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return _with_added(x, places, update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (places,) = ctx.saved_tensors
        return grad, None, take(grad, places)


def _with_added(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    if fused(x) and x.ndim == 3:
        return put_back_gated(x, places, x.new_ones(x.shape[:2], dtype=torch.float32), rows)
    added = (take(x, places) + rows).flatten(0, 1)
    return x.flatten(0, 1).index_copy(0, places.flatten(), added).view_as(x)


def take_out(x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, D] itself, for all other uses, and its rows [b, c, D] at distinct places [b, c]."""
    return _TakeOut.apply(x, places)


def put_back(x: Tensor, places: Tensor, update: Tensor) -> Tensor:
    """A copy of x [B, T, D] with update [b, c, D] added at distinct places [b, c]."""
    return _PutBack.apply(x, places, update)


def put_back_gated(x: Tensor, places: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """A copy of x [B, T, D] with update [b, c, D] times gate [B, T] added at distinct places [b, c]."""
    if fused(x):
        from megadyn.kernels.rows import add_rows

        return add_rows(x.flatten(0, 1), places.flatten(), gate.flatten(), update.flatten(0, 1)).view_as(x)
    return put_back(x, places, (take(gate, places).unsqueeze(-1) * update).to(x.dtype))


def scaled(x: Tensor, gate: Tensor) -> Tensor:
    """x [B, T, D] times gate [B, T], in x's dtype."""
    if fused(x):
        from megadyn.kernels.rows import scale_rows

        return scale_rows(x.flatten(0, 1), gate.flatten()).view_as(x)
    return (gate.unsqueeze(-1) * x).to(x.dtype)


def repeat_or_replace(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """The G heads of x [B, T, G, K], each repeated so that their widths add up to D -> [B, T, D]; at places [b, c] it has rows
    [b, c, D] instead."""
    if fused(x):
        from megadyn.kernels import rows as kernels

        flat = x.flatten(2).flatten(0, 1), places.flatten(), rows.flatten(0, 1)
        return kernels.repeat_or_replace(*flat, x.shape[-1]).unflatten(0, x.shape[:2])
    repeated = (
        x.repeat_interleave(rows.shape[-1] // (x.shape[-2] * x.shape[-1]), dim=2).flatten(0, 1).flatten(1)
    )
    return repeated.index_copy(0, places.flatten(), rows.flatten(0, 1)).unflatten(0, x.shape[:2])


def take_shared(x: Tensor, places: Tensor, seq: Axis) -> tuple[Tensor, Tensor]:
    """`take_out` for x [B, T/seq, D], of which each rank holds a part; every rank gets all tokens."""
    if seq.size == 1:
        return take_out(x, places)
    index, elsewhere = _of_part(x, places, seq)
    return x, reduce_from_tp(take_any(x, index).masked_fill(elsewhere.unsqueeze(-1), 0), seq)


def put_back_shared(x: Tensor, places: Tensor, gate: Tensor, update: Tensor, seq: Axis) -> Tensor:
    """A copy of x [B, T/seq, D] with update [b, c, D], which all ranks hold, times gate [B, T/seq] added at these places."""
    if seq.size == 1:
        return put_back_gated(x, places, gate, update)
    index, elsewhere = _of_part(x, places, seq)
    weight = take_any(gate, index).masked_fill(elsewhere, 0)
    added = (weight.unsqueeze(-1) * copy_to_tp(update, seq)).to(x.dtype)
    return x.flatten(0, 1).index_add(0, index.flatten(), added.flatten(0, 1)).view_as(x)


class SharedOut(NamedTuple):
    """Chosen tokens divided equally among ranks under sequence parallelism, as a split block requires."""

    selection: Selection
    """The tokens, padded to a multiple of the number of ranks by repeating the last one; the padding is ignored."""
    is_extra: Tensor
    """[b, c], true for padding."""

    def take(self, x: Tensor, seq: Axis) -> Tensor:
        """x [B, T/seq, D] -> this rank's part [b, c/seq, D] of the tokens."""
        index, elsewhere = _of_part(x, self.selection.places, seq)
        return leave_tp(
            take_any(x, index).masked_fill((elsewhere | self.is_extra).unsqueeze(-1), 0), seq, seq
        )

    def put_back(self, x: Tensor, gate: Tensor, update: Tensor, seq: Axis) -> Tensor:
        """A copy of x [B, T/seq, D] with the ranks' parts update [b, c/seq, D] times gate [B, T/seq] added."""
        index, elsewhere = _of_part(x, self.selection.places, seq)
        weight = take_any(gate, index).masked_fill(elsewhere | self.is_extra, 0)
        added = (weight.unsqueeze(-1) * enter_tp(update, seq, seq)).to(x.dtype)
        return x.flatten(0, 1).index_add(0, index.flatten(), added.flatten(0, 1)).view_as(x)


def shared_out(selection: Selection, seq: Axis) -> SharedOut:
    """Divides a `selection` with different numbers of tokens per sequence into parts of equal size."""
    places, sequences = selection
    assert sequences is not None, "a row for all sequences"
    count = places.shape[1]
    total = max(1, -(-count // seq.size)) * seq.size
    extra = torch.arange(total, device=places.device).unsqueeze(0) >= count
    if count:
        filled = [torch.cat([x, x[:, -1:].expand(1, total - count)], dim=1) for x in (places, sequences)]
    else:
        filled = [x.new_zeros(1, total) for x in (places, sequences)]
    return SharedOut(Selection(*filled), extra)


def _of_part(x: Tensor, places: Tensor, seq: Axis) -> tuple[Tensor, Tensor]:
    """Places in this rank's part x [B, T/seq, D], and a mask of the tokens in other parts (whose places are meaningless
    and may repeat)."""
    length = x.shape[1]
    sequence, position = places // (length * seq.size), places % (length * seq.size)
    return sequence * length + position % length, position // length != seq.rank


def origins(stream: Stream, selection: Selection, length: int) -> tuple[Tensor, Segments | None]:
    """Origin of tokens chosen from sequences of `length`: their positions in their documents, shaped as `places`, and
    the segments that limit attention among them (None: each row is one)."""
    places, sequences = selection
    if stream.documents is None:
        return places % length, None if sequences is None else segments_of(
            sequences, stream.hidden.shape[0], length
        )
    (ids, ends, _), positions = stream.documents
    return take(positions, places), segments_of(take(ids, places), len(ends) - 1, length)


def as_mask(selection: Selection, shape: torch.Size) -> Tensor:
    """[B, T] = `shape`, true at chosen tokens."""
    places = selection.places.flatten()
    return (
        torch.zeros(shape.numel(), dtype=torch.bool, device=places.device)
        .index_fill(0, places, True)
        .view(shape)
    )
