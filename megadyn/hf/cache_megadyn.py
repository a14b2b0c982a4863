"""The cache of an exported model: in each layer the keys and values of the tokens that it processed, and nothing for others.

Stand-alone: shipped beside the weights, imports nothing of megadyn.
"""

# Dims: B rows, C new packed columns, G key/value heads, K head size, P tokens that a layer holds of the longest row,
#       D hidden, W moving-average window.

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .packing_megadyn import Packed, mask_inside, take_rows


class Slots(NamedTuple):
    """Where new tokens of a layer come to stand."""

    rows: list[int]  # of the batch
    before: list[int]  # tokens that these rows held
    after: list[int]
    new: Packed
    each: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Of each new token its row and slot, and its row and column among the new ones; None: all rows have as many, so that
    they are written as one block."""

    @classmethod
    def of(cls, new: Packed, counts: list[int], device: torch.device) -> "Slots":
        rows = list(range(new.batch)) if new.rows is None else new.rows
        before = [counts[row] for row in rows]
        after = [old + count for old, count in zip(before, new.counts, strict=True)]
        if new.rows is None and new.is_full and min(before) == max(before):
            return cls(rows, before, after, new, None)
        # by sizes that the host knows: nothing here waits for the device
        count_B, total = torch.tensor(new.counts, device=device), sum(new.counts)
        of_N = torch.repeat_interleave(torch.arange(len(rows), device=device), count_B, output_size=total)
        column_N = torch.arange(total, device=device) - (count_B.cumsum(0) - count_B)[of_N]
        slot_N = torch.tensor(before, device=device)[of_N] + column_N
        row_N = of_N if new.row_B is None else new.row_B[of_N]
        return cls(rows, before, after, new, (row_N, slot_N, of_N, column_N))


class Room:
    """Values of the tokens of each row, [B, P, ...] or with P elsewhere, in a block that has room for more.

    The block grows by half, so that a token is copied a few times in all, not once for every later one.
    """

    def __init__(self, dim: int) -> None:
        """`dim`: where P is, 1 or 2."""
        self.dim = dim
        self.block: Tensor | None = None

    def write(self, new: Tensor, slots: Slots) -> None:
        """`new` has the dimensions of the block, C in place of P, and the rows of `slots`."""
        if self.block is None and slots.new.rows is None and not any(slots.before):
            self.block = new  # the tokens stand as they must already
            return
        block = self.roomy(new, max(slots.after), slots.new.batch)
        if slots.each is None:
            block.narrow(self.dim, slots.before[0], new.shape[self.dim]).copy_(new)
            return
        row_N, slot_N, of_N, column_N = slots.each
        if self.dim == 1:
            block[row_N, slot_N] = new[of_N, column_N]
        else:
            block[row_N, :, slot_N] = new[of_N, :, column_N]

    def roomy(self, new: Tensor, needed: int, batch: int) -> Tensor:
        """The block, if it has room and may be written in place; else a larger copy."""
        old = self.block
        if old is None:
            shape = [batch, *new.shape[1:]]
            shape[self.dim] = needed
            self.block = new.new_zeros(shape)
            return self.block
        room = old.shape[self.dim]
        # what a backward pass will read, and what inference mode made, is left as it is
        is_bound = new.requires_grad or old.requires_grad or (old.is_inference() and not new.is_inference())
        if needed > room or is_bound:
            shape = list(old.shape)
            shape[self.dim] = room if needed <= room else max(needed, room + room // 2)
            self.block = old.new_zeros(shape)
            self.block.narrow(self.dim, 0, room).copy_(old)
        assert self.block is not None
        return self.block

    def read(self, count: int, packed: Packed) -> Tensor:
        """The first `count` values of the packed rows."""
        assert self.block is not None
        return take_rows(self.block.narrow(self.dim, 0, count), packed)

    def select_rows(self, row_B: Tensor) -> None:
        if self.block is not None:
            self.block = self.block.index_select(0, row_B)


class LayerCache:
    """Keys and values of the tokens that one layer processed, packed; layers that score by surprise keep what it needs too."""

    def __init__(self) -> None:
        self.keys, self.values = Room(2), Room(2)  # [B, G, P, K]
        self.segments = Room(1)  # the text each belongs to; without a block each row is one
        self.recent_BW: Tensor | None = None  # the W - 1 latest static surprises
        self.last_BD: Tensor | None = None  # what the layer made of its latest token
        self.again: LayerCache | None = None  # of the second time, where a layer processes tokens twice
        self.counts: list[int] = []  # tokens held, per row

    def append(
        self, key_BGCK: Tensor, value_BGCK: Tensor, new: Packed
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the new tokens; returns the keys and values [rows in it, G, P, K] and the mask [rows, C, P] that they attend
        with (None: all before them)."""
        self.counts = self.counts or [0] * new.batch
        is_first = not any(self.counts)
        slots = Slots.of(new, self.counts, key_BGCK.device)
        for row, count in zip(slots.rows, slots.after, strict=True):
            self.counts[row] = count
        self.keys.write(key_BGCK, slots)
        self.values.write(value_BGCK, slots)
        if new.segment_BC is not None:
            self.segments.write(new.segment_BC, slots)  # what came before the first border is text 0
        if is_first:
            return key_BGCK, value_BGCK, mask_inside(new)
        longest = max(slots.after)
        mask_BCP = self.mask(slots, longest, key_BGCK.device)
        return self.keys.read(longest, new), self.values.read(longest, new), mask_BCP

    def mask(self, slots: Slots, longest: int, device: torch.device) -> Tensor | None:
        """[rows, C, P] of what each new token sees; None: all that its row holds."""
        new = slots.new
        columns = new.valid_BC.shape[1]
        if columns == 1 and min(slots.after) == longest and new.segment_BC is None:
            return None
        last_BC = torch.tensor(slots.before, device=device)[:, None] + torch.arange(columns, device=device)
        mask_BCP = torch.arange(longest, device=device) <= last_BC[..., None]
        if new.segment_BC is not None:
            is_inside_BCP = self.segments.read(longest, new)[:, None, :] == new.segment_BC[..., None]
            # a query that sees nothing would give NaN
            mask_BCP = mask_BCP & (is_inside_BCP | ~new.valid_BC[..., None])
        return mask_BCP

    def continues(self, new: Packed) -> Tensor:
        """Of the rows in `new`, those whose first token belongs to the text of the last token held."""
        rows = range(new.batch) if new.rows is None else new.rows
        counts = [self.counts[row] for row in rows] if self.counts else [0] * len(new.counts)
        count_B = torch.tensor(counts, device=new.valid_BC.device)
        if new.segment_BC is None or not any(counts):
            return count_B > 0
        last_B = torch.zeros_like(new.segment_BC[:, 0])  # text 0 while each row was one
        if self.segments.block is not None:
            segment_BP = take_rows(self.segments.block, new)
            last_B = segment_BP.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0]
        return (count_B > 0) & (last_B == new.segment_BC[:, 0])

    def second(self) -> "LayerCache":
        """Keys and values of the tokens that the layer processed once more."""
        self.again = self.again or LayerCache()
        return self.again

    def select_rows(self, rows: list[int], row_B: Tensor) -> None:
        """`row_B`: the same as `rows`, on the device."""
        if self.again is not None:
            self.again.select_rows(rows, row_B)
        if self.recent_BW is not None:
            self.recent_BW = self.recent_BW.index_select(0, row_B)
        if self.last_BD is not None:
            self.last_BD = self.last_BD.index_select(0, row_B)
        for room in (self.keys, self.values, self.segments):
            room.select_rows(row_B)
        self.counts = [self.counts[row] for row in rows] if self.counts else []


class Texts(NamedTuple):
    """Where each row of a cache stands in the text that its last token belongs to."""

    position_B: Tensor  # of the next token, as rotary embedding counts
    place_B: Tensor  # of the next token in its text; another number where a caller gives positions
    ended_B: Tensor  # whether the last token ended a document
    segment_B: Tensor | None = None  # the number of the text in its row; None while each row is one text

    @classmethod
    def at_start(cls, rows: int, device: torch.device) -> "Texts":
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(zeros, zeros, zeros.bool())

    def select_rows(self, row_B: Tensor) -> "Texts":
        segment_B = None if self.segment_B is None else self.segment_B[row_B]
        return Texts(self.position_B[row_B], self.place_B[row_B], self.ended_B[row_B], segment_B)


class MegadynCache(Cache):
    """A LayerCache per layer, in the form that `generate` uses. Its length counts columns, padding included."""

    layers: list[LayerCache]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerCache() for _ in range(num_layers)])
        self.columns = 0
        self.seen: list[int] = []  # real tokens so far, per row
        self.texts: Texts | None = None

    def advance(self, columns: int, counts: list[int], texts: "Texts") -> None:
        """Called once all layers have taken up a call's tokens."""
        self.columns += columns
        self.seen = [old + count for old, count in zip(self.seen, counts, strict=True)]
        self.texts = texts

    def tokens_per_layer(self) -> list[list[int]]:
        """How many tokens each layer holds, for each row of the batch."""
        return [layer.counts or [0] * len(self.seen) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a routed model's cache cannot be cropped: layers hold different tokens")

    def reset(self) -> None:
        self.layers = [LayerCache() for _ in self.layers]
        self.columns, self.seen, self.texts = 0, [], None

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.tolist()
        if rows == list(range(len(self.seen))):
            return
        if self.texts is not None:
            row_B = indices.to(self.texts.place_B.device)
            self.texts = self.texts.select_rows(row_B)
            for layer in self.layers:
                layer.select_rows(rows, row_B)
        self.seen = [self.seen[row] for row in rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))
