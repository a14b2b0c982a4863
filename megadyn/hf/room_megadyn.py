"""Where a layer's cache keeps values of tokens: blocks with room to grow, and the places of new tokens in them.

Stand-alone: ships with the weights and imports nothing from megadyn.
"""

# Dims: B rows, C new packed columns, P tokens that a layer holds for the longest row, N new tokens of all rows.

from typing import NamedTuple

import torch
from torch import Tensor

from .packing_megadyn import Packed, take_rows


class Slots(NamedTuple):
    """Where a layer stores its new tokens."""

    rows: list[int]  # rows of the batch that have new tokens
    before: list[int]  # number of tokens held per row before the call
    after: list[int]  # the same after the call
    new: Packed
    each: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Per new token: its row and slot in the cache, and its row and column in `new`. None if all rows have equally many
    tokens, which are then written as one block."""

    @classmethod
    def of(cls, new: Packed, counts: list[int], device: torch.device) -> "Slots":
        rows = list(range(new.batch)) if new.rows is None else new.rows
        before = [counts[row] for row in rows]
        after = [old + count for old, count in zip(before, new.known(), strict=True)]
        if new.rows is None and new.is_full and min(before) == max(before):
            return cls(rows, before, after, new, None)
        # The host knows these sizes, so nothing here waits for the device.
        count_B, total = new.counted(), sum(new.known())
        of_N = torch.repeat_interleave(torch.arange(len(rows), device=device), count_B, output_size=total)
        column_N = torch.arange(total, device=device) - (count_B.cumsum(0) - count_B)[of_N]
        slot_N = torch.tensor(before, device=device)[of_N] + column_N
        row_N = of_N if new.row_B is None else new.row_B[of_N]
        return cls(rows, before, after, new, (row_N, slot_N, of_N, column_N))


class Room:
    """Per-row values of tokens, [B, P, ...] or with P in another dimension, in a block that has room to grow.

    The block grows by half its size, so a token is copied only a few times in total.
    """

    def __init__(self, dim: int) -> None:
        """`dim`: the dimension of P, 1 or 2."""
        self.dim = dim
        self.block: Tensor | None = None

    def write(self, new: Tensor, slots: Slots) -> None:
        """`new` has the dimensions of the block, with C instead of P, and the rows of `slots`."""
        if self.block is None and slots.new.rows is None and not any(slots.before):
            self.block = new  # the tokens are already in place
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
        """The block if it has room and may be written in place, otherwise a larger copy."""
        old = self.block
        if old is None:
            shape = [batch, *new.shape[1:]]
            shape[self.dim] = needed
            self.block = new.new_zeros(shape)
            return self.block
        room = old.shape[self.dim]
        # Do not write into tensors that a backward pass will read or that inference mode created.
        is_bound = new.requires_grad or old.requires_grad or (old.is_inference() and not new.is_inference())
        if needed > room or is_bound:
            shape = list(old.shape)
            shape[self.dim] = room if needed <= room else max(needed, room + room // 2)
            self.block = old.new_empty(shape)
            self.block.narrow(self.dim, 0, room).copy_(old)
            # A masked key must still be a finite number.
            self.block.narrow(self.dim, room, shape[self.dim] - room).zero_()
        assert self.block is not None
        return self.block

    def read(self, count: int, packed: Packed) -> Tensor:
        """The first `count` values of the packed rows."""
        assert self.block is not None
        return take_rows(self.block.narrow(self.dim, 0, count), packed)

    def select_rows(self, row_B: Tensor) -> None:
        if self.block is not None:
            self.block = self.block.index_select(0, row_B)

    def select_tokens(self, slot_BP: Tensor) -> None:
        """Keeps what is in these slots of each row, in a block without further room."""
        if self.block is not None:
            row_B1 = torch.arange(len(slot_BP), device=slot_BP.device)[:, None]
            block = self.block.movedim(self.dim, 1)[row_B1, slot_BP]
            self.block = block.movedim(1, self.dim).contiguous()
