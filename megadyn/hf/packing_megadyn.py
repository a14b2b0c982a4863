"""Packing: shifts some tokens of each row together, and tracks where sequences and documents begin among them.

Stand-alone: ships with the weights and imports nothing from megadyn. `modeling_megadyn.py` explains the idea.
"""

# Dims: B rows, T columns as given, C packed columns.

import math
from typing import NamedTuple

import torch
from torch import Tensor

# ---- packing -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Some tokens of each row, shifted to the left in order. Columns beyond a row's count hold arbitrary tokens.

    If all tokens are chosen, nothing is moved. Rows without chosen tokens are left out. In STATIC shapes (`counts` is None)
    no row is left out and no column cut, so that the host need not know how many tokens were chosen; a single column
    is never moved.
    """

    valid_BC: Tensor  # False beyond the row's count
    counts: list[int] | None  # per packed row; None: static shapes, and only the device knows
    batch: int  # rows of the whole batch
    # Original column of each token, distinct within a row; None: tokens were not moved.
    index_BC: Tensor | None = None
    rows: list[int] | None = None  # which rows of the batch are packed; None: all
    row_B: Tensor | None = None  # the same on the device
    # The text that each token belongs to, which limits its attention. None: each row is one text.
    segment_BC: Tensor | None = None
    # Of each token in its text, from 0, whichever others were left out; None if no layer has a sliding window.
    place_BC: Tensor | None = None

    def columns(self) -> Tensor:
        """[B, C]: the original column of each token."""
        if self.index_BC is not None:
            return self.index_BC
        return torch.arange(self.valid_BC.shape[1], device=self.valid_BC.device).expand_as(self.valid_BC)

    @property
    def is_static(self) -> bool:
        """Whether shapes are the same whatever was chosen."""
        return self.counts is None

    @property
    def is_full(self) -> bool:
        """Whether every row's count equals the number of columns, as far as the host knows."""
        return self.counts is not None and min(self.counts, default=0) == self.valid_BC.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether no token was chosen, as far as the host knows."""
        return self.counts is not None and not any(self.counts)

    def known(self) -> list[int]:
        """The counts, where shapes are not static."""
        assert self.counts is not None
        return self.counts

    def counted(self) -> Tensor:
        """The counts on the device."""
        if self.counts is None:
            return self.valid_BC.sum(1)
        return torch.tensor(self.counts, device=self.valid_BC.device)


def whole(rows: int, columns: int, device: torch.device, static: bool = False) -> Packed:
    """All tokens of a batch, without inspecting them."""
    valid_BC = torch.ones(rows, columns, dtype=torch.bool, device=device)
    return Packed(valid_BC, None if static else [columns] * rows, rows)


def pack(
    mask_BT: Tensor, among: Packed | None = None, all_rows: bool = False, static: bool = False
) -> Packed:
    """The tokens where the mask is True, in as many columns as the longest row needs. Rows without any are left out.

    With `all_rows` they stay, and there is at least one column. Waits for the device once, to read the counts. `among`: the
    tokens that the mask is of, whose texts and places they keep. `static`, or static shapes there: see `pack_static`.
    """
    segment_BT, place_BT = (None, None) if among is None else (among.segment_BC, among.place_BC)
    if static or (among is not None and among.is_static):
        return pack_static(mask_BT, segment_BT, place_BT)
    batch, columns = mask_BT.shape
    counts, rows, row_B = mask_BT.sum(1).tolist(), None, None
    if not all_rows and 0 in counts:
        rows = [row for row, count in enumerate(counts) if count]
        counts = [counts[row] for row in rows]
        row_B = torch.tensor(rows, dtype=torch.long, device=mask_BT.device)
        mask_BT = mask_BT[row_B]
        segment_BT, place_BT = (None if x is None else x[row_B] for x in (segment_BT, place_BT))
    if min(counts, default=columns) == columns:
        return Packed(mask_BT, counts, batch, None, rows, row_B, segment_BT, place_BT)
    width = max(1, *counts)
    index_BC = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    count_B = torch.tensor(counts, device=mask_BT.device)
    valid_BC = torch.arange(width, device=mask_BT.device) < count_B[:, None]
    segment_BC, place_BC = (None if x is None else x.gather(1, index_BC) for x in (segment_BT, place_BT))
    return Packed(valid_BC, counts, batch, index_BC, rows, row_B, segment_BC, place_BC)


def pack_static(mask_BT: Tensor, segment_BT: Tensor | None, place_BT: Tensor | None) -> Packed:
    """In static shapes: as many rows and columns as the mask has. Reads nothing on the host."""
    batch, columns = mask_BT.shape
    if columns == 1:
        return Packed(mask_BT, None, batch, segment_BC=segment_BT, place_BC=place_BT)
    index_BC = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    valid_BC = torch.arange(columns, device=mask_BT.device) < mask_BT.sum(1, keepdim=True)
    segment_BC, place_BC = (None if x is None else x.gather(1, index_BC) for x in (segment_BT, place_BT))
    return Packed(valid_BC, None, batch, index_BC, segment_BC=segment_BC, place_BC=place_BC)


def take(x: Tensor, packed: Packed) -> Tensor:
    """[B, T, ...] -> [rows in it, C, ...]. Returns the same tensor if every token was packed."""
    x = take_rows(x, packed)
    if packed.index_BC is None:
        return x
    return x.gather(1, _over_columns(packed.index_BC, x).expand(-1, -1, *x.shape[2:]))


def put_back(base: Tensor, packed: Packed, x: Tensor) -> Tensor:
    """`base` [B, T, ...] with its packed tokens replaced by `x` [rows in it, C, ...]."""
    if packed.index_BC is None and packed.is_static:
        return torch.where(_over_columns(packed.valid_BC, x), x, base)
    if packed.index_BC is not None:
        old, index_BC = take_rows(base, packed), packed.index_BC
        if not packed.is_full:
            before = old.gather(1, _over_columns(index_BC, x).expand_as(x))
            x = torch.where(_over_columns(packed.valid_BC, x), x, before)
        x = old.scatter(1, _over_columns(index_BC, x).expand_as(x), x)
    return x if packed.row_B is None else base.index_copy(0, packed.row_B, x)


def take_rows(x: Tensor, packed: Packed) -> Tensor:
    """[B, ...] -> [rows in it, ...]."""
    return x if packed.row_B is None else x.index_select(0, packed.row_B)


def put_rows(base: Tensor | None, packed: Packed, x: Tensor) -> Tensor:
    """`base` [B, ...] (None: zeros) with its packed rows replaced by `x` [rows in it, ...]."""
    if packed.row_B is None:
        return x
    return (x.new_zeros(packed.batch, *x.shape[1:]) if base is None else base).index_copy(0, packed.row_B, x)


def at_last(x_BC: Tensor, packed: Packed, before: Tensor | None = None) -> Tensor:
    """[rows, C, ...] -> [rows, ...]: the value at each row's last token, or `before` (None: zeros) if it has no token."""
    if packed.is_full:
        return x_BC[:, -1]
    count_B = packed.counted()
    last = x_BC[torch.arange(len(count_B), device=x_BC.device), (count_B - 1).clamp(min=0)]
    has_B = (count_B > 0).view(-1, *[1] * (last.dim() - 1))
    return torch.where(has_B, last, torch.zeros_like(last) if before is None else before)


def _over_columns(per_column_BC: Tensor, x: Tensor) -> Tensor:
    """Adds trailing dimensions to [B, C] until it has as many as `x` [B, C or T, ...]."""
    return per_column_BC.view(*per_column_BC.shape, *[1] * (x.dim() - 2))


def best_of_each_row(
    score_BC: Tensor, tokens: Packed, capacity: float, sequence_BC: Tensor | None = None
) -> Tensor:
    """Mask [B, C] of the k = max(1, floor(capacity * tokens)) best scores of each sequence; the earlier token wins a tie.

    `sequence_BC` numbers the sequences of a row in ascending order; None if each row is one.
    """
    columns = score_BC.shape[1]
    if sequence_BC is None:
        sequence_BC = torch.zeros_like(tokens.valid_BC, dtype=torch.long)
    sequence_BC = sequence_BC.masked_fill(~tokens.valid_BC, columns)  # sorts after all others
    best_first_BC = score_BC.masked_fill(~tokens.valid_BC, -math.inf).argsort(
        dim=1, descending=True, stable=True
    )
    by_sequence_BC = sequence_BC.gather(1, best_first_BC).argsort(dim=1, stable=True)
    best_first_BC = best_first_BC.gather(1, by_sequence_BC)
    sorted_BC = sequence_BC.gather(1, best_first_BC)
    start_BC, end_BC = (torch.searchsorted(sorted_BC, sorted_BC, right=right) for right in (False, True))
    wanted = torch.tensor(
        [max(1, math.floor(capacity * count)) for count in range(columns + 1)], device=score_BC.device
    )
    rank_BC = torch.arange(columns, device=score_BC.device) - start_BC
    chosen_BC = rank_BC < wanted[end_BC - start_BC]
    return torch.zeros_like(tokens.valid_BC).scatter(1, best_first_BC, chosen_BC) & tokens.valid_BC


# ---- sequences and documents ---------------------------------------------------------------------


def sequence_ids(cu_seq_lens: Tensor, max_length: int | Tensor | None, rows: int, columns: int) -> Tensor:
    """Sequence numbers [B, T] from cumulative lengths [sequences + 1] over the flattened batch, as in FlashAttention."""
    total = rows * columns
    if (
        cu_seq_lens.dim() != 1
        or cu_seq_lens[0] != 0
        or cu_seq_lens[-1] != total
        or (cu_seq_lens.diff() < 0).any()
    ):
        raise ValueError(f"cu_seq_lens_q must rise from 0 to {total}, the number of tokens")
    longest = int(cu_seq_lens.diff().max())
    if max_length is not None and int(max_length) < longest:
        raise ValueError(
            f"max_length_q = {int(max_length)}: must be at least {longest}, the longest sequence of cu_seq_lens_q"
        )
    place = torch.arange(total, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    ids_BT = torch.searchsorted(cu_seq_lens, place, right=True).view(rows, columns)
    if (ids_BT[1:, 0] == ids_BT[:-1, -1]).any():
        raise ValueError("cu_seq_lens_q: a sequence must not continue in the next row")
    return ids_BT


class Borders(NamedTuple):
    """Masks [B, C] of where texts begin and end among a call's packed tokens. The first token of a row is marked only if
    earlier calls gave the row tokens."""

    sequence_BC: Tensor  # begins a sequence
    text_BC: Tensor  # begins a sequence or a document
    ended_BC: Tensor  # ends a document


def changes(x_BC: Tensor) -> Tensor:
    """Mask [B, C] of the values that differ from the previous one in their row."""
    changed_BC = torch.zeros_like(x_BC, dtype=torch.bool)
    changed_BC[:, 1:] = x_BC[:, 1:] != x_BC[:, :-1]
    return changed_BC


def restarts(position_BC: Tensor, column_BC: Tensor, goes_on_B: Tensor) -> Tensor:
    """Mask [B, C] of the tokens that begin a sequence: their position is not the previous position plus the distance in
    tokens, nor plus the distance in columns (which counts padding in between). The first token of a row with tokens in
    the cache (`goes_on_B`) begins a sequence if its position is 0."""
    step_BC = position_BC.diff(dim=1)
    begins_BC = torch.zeros_like(position_BC, dtype=torch.bool)
    begins_BC[:, 1:] = (step_BC != 1) & (step_BC != column_BC.diff(dim=1))
    begins_BC[:, 0] = goes_on_B & (position_BC[:, 0] == 0)
    return begins_BC


def first_columns(begins_BC: Tensor) -> Tensor:
    """[B, C]: the column where each token's text begins, or -1 if it began in an earlier call."""
    column_C = torch.arange(begins_BC.shape[1], device=begins_BC.device)
    return torch.where(begins_BC, column_C, -1).cummax(dim=1).values


def mask_inside(tokens: Packed, window: int | None = None) -> Tensor | None:
    """Mask [B, C, C]: each token sees the earlier tokens of its own text, of which `window` places end with its own. None: it
    sees all before it in the row."""
    if tokens.segment_BC is None and window is None:
        return None
    columns = tokens.valid_BC.shape[1]
    mask_BCC = torch.ones(1, columns, columns, dtype=torch.bool, device=tokens.valid_BC.device).tril()
    if tokens.segment_BC is not None:
        mask_BCC = mask_BCC & (tokens.segment_BC[:, :, None] == tokens.segment_BC[:, None, :])
    if window is not None:
        mask_BCC = mask_BCC & is_near(places_of(tokens), places_of(tokens), window)
    return mask_BCC.expand(tokens.valid_BC.shape[0], -1, -1)


def places_of(tokens: Packed) -> Tensor:
    """Raises ValueError if they are unknown: a window would then be counted over the wrong tokens."""
    if tokens.place_BC is None:
        raise ValueError("a layer with a sliding window needs tokens packed `among` those of the call")
    return tokens.place_BC


def is_near(query_BC: Tensor, key_BP: Tensor, window: int) -> Tensor:
    """Mask [B, C, P] by places in the text: the key's is less than `window` before the query's."""
    return query_BC[:, :, None] - key_BP[:, None, :] < window
