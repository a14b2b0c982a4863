"""The cache of an exported model: each layer holds the keys and values of only those tokens that it processed, and of these, if
it has a sliding window, only those that a later token sees.

Stand-alone: ships with the weights and imports nothing from megadyn.
"""

# Dims: B rows, C new packed columns, G key/value heads, K head size, P tokens that a layer holds for the longest row,
#       D hidden, W moving-average window.

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .packing_megadyn import Packed, at_last, is_near, mask_inside, places_of, put_rows, take_rows
from .room_megadyn import Room, Slots


class Trail(NamedTuple):
    """What a layer remembers of its latest token, after each token of a call."""

    value_BC: Tensor  # [rows in the call, C, ...]
    before: Tensor  # [rows in the call, ...], for rows without a token
    others: Tensor | None  # [B, ...], for rows that are not in the call
    new: Packed  # the tokens of the call that it follows, which may be more than the layer holds

    def at_end(self) -> Tensor:
        return put_rows(self.others, self.new, at_last(self.value_BC, self.new, self.before))

    def cropped(self, kept: list[int]) -> "Trail":
        """The trail of only the first `kept` tokens of each row."""
        return self._replace(new=self.new._replace(counts=counts_within(self.new, kept)))


def counts_within(new: Packed, kept: list[int]) -> list[int]:
    """How many of each packed row's tokens are among the first `kept` of the row, as given."""
    rows = range(new.batch) if new.rows is None else new.rows
    kept_B = torch.tensor([kept[row] for row in rows], device=new.valid_BC.device)
    counts: list[int] = ((new.columns() < kept_B[:, None]) & new.valid_BC).sum(1).tolist()
    return counts


class LayerCache:
    """Packed keys and values of the tokens that one layer processed, and what a layer needs to score tokens by surprise."""

    def __init__(self) -> None:
        self.keys, self.values = Room(2), Room(2)  # [B, G, P, K]
        self.places = Room(1)  # of each token in its text, if the layer has a sliding window
        self.segments = Room(1)  # the text that each token belongs to; without a block each row is one text
        self.recent_BW: Tensor | None = None  # the W - 1 latest values of a moving average
        self.last_BD: Tensor | None = None  # the layer's output for its latest token
        self.again: LayerCache | None = None  # cache of the second pass, if the layer processes tokens twice
        self.counts: list[int] = []  # tokens held, per row
        self.window: int | None = None
        self.longest = 0  # of the rows, when `forget` last looked
        self.begin_call()

    def held(self, rows: int) -> list[int]:
        """The number of tokens held, per row."""
        return self.counts or [0] * rows

    def begin_call(self) -> None:
        """Forgets how to undo the previous call."""
        self.latest: Slots | None = None
        self.trails: dict[str, Trail] = {}
        if self.again is not None:
            self.again.begin_call()

    def append(
        self, key_BGCK: Tensor, value_BGCK: Tensor, new: Packed, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the new tokens. Returns the keys and values [rows in it, G, P, K] to attend to, and the mask
        [rows, C, P] (None: each token sees all before it). `window`: places in its text that a token sees."""
        self.counts = self.counts or [0] * new.batch
        is_first = not any(self.counts)
        slots = Slots.of(new, self.counts, key_BGCK.device)
        self.latest = slots
        self.set_counts(slots.after)
        self.keys.write(key_BGCK, slots)
        self.values.write(value_BGCK, slots)
        if new.segment_BC is not None:
            self.segments.write(new.segment_BC, slots)  # tokens before the first border belong to text 0
        if window is not None:
            self.window = window
            self.places.write(places_of(new), slots)
        if is_first:
            return key_BGCK, value_BGCK, mask_inside(new, window)
        longest = max(slots.after)
        mask_BCP = self.mask(slots, longest, key_BGCK.device, window)
        return self.keys.read(longest, new), self.values.read(longest, new), mask_BCP

    def forget(self, texts: "Texts") -> None:
        """Drops the tokens, but each row's last, that no later query sees. Called when nothing can be taken back any more.
        Waits for the device, and copies, and so looks only after an eighth of a window more tokens."""
        if self.again is not None:
            self.again.forget(texts)
        longest = max(self.counts, default=0)
        if self.window is None or self.places.block is None or longest <= self.longest + self.window // 8:
            return
        place_BP = self.places.block[:, :longest]
        slot_P = torch.arange(longest, device=place_BP.device)
        is_seen_BP = texts.place_B.to(place_BP.device)[:, None] - place_BP < self.window
        if texts.segment_B is not None and self.segments.block is not None:
            segment_B = texts.segment_B.to(place_BP.device)
            is_seen_BP &= self.segments.block[:, :longest] == segment_B[:, None]
        count_B = torch.tensor(self.counts, device=place_BP.device)
        first_B = (is_seen_BP | (slot_P >= count_B[:, None] - 1)).int().argmax(1)
        first = first_B.tolist()
        if any(first):
            self.counts = [count - dropped for count, dropped in zip(self.counts, first, strict=True)]
            longest = max(self.counts)
            slot_BP = (first_B[:, None] + slot_P[:longest]).clamp(max=len(slot_P) - 1)
            for room in (self.keys, self.values, self.segments, self.places):
                room.select_tokens(slot_BP)
        self.longest = longest

    def set_counts(self, counts: list[int]) -> None:
        """Sets the counts of the rows that the latest call appended to."""
        assert self.latest is not None
        for row, count in zip(self.latest.rows, counts, strict=True):
            self.counts[row] = count

    def keep_latest(self, name: str, value_BC: Tensor, before: Tensor, new: Packed) -> None:
        """Sets the attribute `name`, `recent_BW` or `last_BD`, to the value of each row's last new token."""
        self.trails[name] = Trail(value_BC, before, getattr(self, name), new)
        setattr(self, name, self.trails[name].at_end())

    def crop(self, kept: list[int]) -> None:
        """Of the latest call, keeps only what belongs to the first `kept` tokens of each row."""
        if self.again is not None:
            self.again.crop(kept)
        if self.latest is not None:
            counts = counts_within(self.latest.new, kept)
            self.set_counts([old + count for old, count in zip(self.latest.before, counts, strict=True)])
        for name, trail in self.trails.items():  # a layer may follow tokens of which it holds none
            setattr(self, name, trail.cropped(kept).at_end())
        self.begin_call()

    def mask(self, slots: Slots, longest: int, device: torch.device, window: int | None) -> Tensor | None:
        """[rows, C, P]: what each new token sees. None: everything that its row holds."""
        new = slots.new
        columns = new.valid_BC.shape[1]
        if columns == 1 and min(slots.after) == longest and new.segment_BC is None and window is None:
            return None
        last_BC = torch.tensor(slots.before, device=device)[:, None] + torch.arange(columns, device=device)
        mask_BCP = torch.arange(longest, device=device) <= last_BC[..., None]
        if new.segment_BC is not None:
            is_inside_BCP = self.segments.read(longest, new)[:, None, :] == new.segment_BC[..., None]
            # A query that sees nothing would give NaN.
            mask_BCP = mask_BCP & (is_inside_BCP | ~new.valid_BC[..., None])
        if window is not None:
            is_near_BCP = is_near(places_of(new), self.places.read(longest, new), window)
            mask_BCP = mask_BCP & (is_near_BCP | ~new.valid_BC[..., None])
        return mask_BCP

    def continues(self, new: Packed) -> Tensor:
        """For each row in `new`: whether its first token belongs to the same text as the last token held."""
        rows = range(new.batch) if new.rows is None else new.rows
        counts = [self.counts[row] for row in rows] if self.counts else [0] * len(rows)
        count_B = torch.tensor(counts, device=new.valid_BC.device)
        if new.segment_BC is None or not any(counts):
            return count_B > 0
        last_B = torch.zeros_like(new.segment_BC[:, 0])  # text 0 as long as each row is one text
        if self.segments.block is not None:
            segment_BP = take_rows(self.segments.block, new)
            last_B = segment_BP.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0]
        return (count_B > 0) & (last_B == new.segment_BC[:, 0])

    def second(self) -> "LayerCache":
        """Keys and values of the tokens that the layer processed a second time."""
        self.again = self.again or LayerCache()
        return self.again

    def select_rows(self, rows: list[int], row_B: Tensor) -> None:
        """`row_B` holds the same as `rows`, on the device."""
        self.begin_call()
        if self.again is not None:
            self.again.select_rows(rows, row_B)
        if self.recent_BW is not None:
            self.recent_BW = self.recent_BW.index_select(0, row_B)
        if self.last_BD is not None:
            self.last_BD = self.last_BD.index_select(0, row_B)
        for room in (self.keys, self.values, self.segments, self.places):
            room.select_rows(row_B)
        self.counts = [self.counts[row] for row in rows] if self.counts else []


class Texts(NamedTuple):
    """For each row of a cache: the position in the text that its last token belongs to."""

    position_B: Tensor  # RoPE position of the next token
    # Index of the next token in its text; differs from its position if the caller gives positions.
    place_B: Tensor
    ended_B: Tensor  # whether the last token ended a document
    segment_B: Tensor | None = None  # the number of the text in its row; None as long as each row is one text

    @classmethod
    def at_start(cls, rows: int, device: torch.device) -> "Texts":
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(zeros, zeros, zeros.bool())

    def after(
        self, tokens: Packed, position_BC: Tensor, place_BC: Tensor, ended_BC: Tensor | None
    ) -> "Texts":
        """The state after a call: at each row's last token, or unchanged for a row without tokens."""
        segment_BC = tokens.segment_BC
        return Texts(
            at_last(position_BC + 1, tokens, self.position_B),
            at_last(place_BC + 1, tokens, self.place_B),
            self.ended_B if ended_BC is None else at_last(ended_BC, tokens, self.ended_B),
            None if segment_BC is None else at_last(segment_BC, tokens, self.segment_B),
        )

    def select_rows(self, row_B: Tensor) -> "Texts":
        segment_B = None if self.segment_B is None else self.segment_B[row_B]
        return Texts(self.position_B[row_B], self.place_B[row_B], self.ended_B[row_B], segment_B)


class Call(NamedTuple):
    """What is needed to undo part of the latest call."""

    columns: int
    tokens: Packed
    before: Texts
    position_BC: Tensor
    place_BC: Tensor
    ended_BC: Tensor | None  # None: no document can end

    def texts(self, tokens: Packed) -> Texts:
        """The state of each row after `tokens`, which are tokens of this call."""
        return self.before.after(tokens, self.position_BC, self.place_BC, self.ended_BC)


class MegadynCache(Cache):
    """One LayerCache per layer, in the form that `generate` uses. Its length counts columns, including padding."""

    layers: list[LayerCache]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerCache() for _ in range(num_layers)])
        self.columns = 0
        self.seen: list[int] = []  # real tokens so far, per row
        self.texts: Texts | None = None
        self.call: Call | None = None

    @property
    def rows(self) -> int:
        """Sequences that the cache holds; 0 before the first call."""
        return len(self.seen)

    @property
    def is_begun(self) -> bool:
        """Whether any row has tokens."""
        return any(self.seen)

    def begin_rows(self, rows: int) -> None:
        """Says how many sequences there will be."""
        self.seen = [0] * rows

    def going_on(self, device: torch.device) -> Tensor:
        """Rows that have tokens."""
        return torch.tensor(self.seen, device=device) > 0

    def make_room(self, columns: int, is_static: bool) -> None:
        """Nothing: the cache grows."""

    def begin_call(self) -> None:
        self.call = None
        for layer in self.layers:
            layer.begin_call()
            if self.texts is not None:
                layer.forget(self.texts)

    def advance(self, call: Call) -> None:
        """Called after all layers have processed a call's tokens."""
        self.columns += call.columns
        self.seen = [old + count for old, count in zip(self.seen, call.tokens.known(), strict=True)]
        self.texts, self.call = call.texts(call.tokens), call

    def tokens_per_layer(self) -> list[list[int]]:
        """Number of tokens that each layer holds, per row of the batch."""
        return [layer.held(self.rows) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -`tokens_to_remove` columns. As in transformers' caches, but limited to the latest call.

        Raises ValueError for more, because a layer keeps its state (recent surprises, last output) only for that call.
        """
        if tokens_to_remove == 0:
            return
        last = 0 if self.call is None else self.call.columns
        if not 0 < -tokens_to_remove <= last:
            raise ValueError(
                f"crop({tokens_to_remove}): must be from -{last} to 0, because a routed model's cache can only undo "
                "its latest call (so a routed model can be assisted, but cannot be an assistant)"
            )
        assert self.call is not None
        tokens, left = self.call.tokens, last + tokens_to_remove
        kept = ((tokens.columns() < left) & tokens.valid_BC).sum(1).tolist()
        for layer in self.layers:
            layer.crop(kept)
        self.columns += tokens_to_remove
        self.seen = [
            count - new + old for count, new, old in zip(self.seen, tokens.known(), kept, strict=True)
        ]
        self.texts, self.call = self.call.texts(tokens._replace(counts=kept)), None

    def reset(self) -> None:
        self.layers = [LayerCache() for _ in self.layers]
        self.columns, self.seen, self.texts, self.call = 0, [], None, None

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.tolist()
        if rows == list(range(len(self.seen))):
            return
        self.call = None
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
