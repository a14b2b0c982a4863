"""A cache of fixed size, with which a decoding step has the same shapes whatever the layers choose and reads nothing on the
host: one graph for `torch.compile`, CUDA graphs and `torch.export`.

Stand-alone: ships with the weights and imports nothing from megadyn.

Each layer has room for all tokens, but holds, per row, only those that it processed, one after another, as the growing cache
does. The number held is a tensor. A token that a layer skips is written to a last place that no token sees.
"""

# Dims: B rows, C new packed columns, G key/value heads, K head size, S places in a buffer, D hidden, W moving-average window.

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache_megadyn import Call, LayerCache, MegadynCache, Texts
from .configuration_megadyn import MegadynConfig
from .packing_megadyn import Packed, at_last, is_near, mask_inside, places_of, take_rows

MULTIPLE = 8
"""Buffers have a multiple of so many places, for attention's kernels."""

NAMES = ("key_BGSK", "value_BGSK", "segment_BS", "place_BS", "count_B", "recent_BW", "last_BD")
"""The tensors of a layer's cache, by the name of their attribute."""


class StaticLayerCache(LayerCache):
    """Tensors that are written in place, never replaced. Must not be cropped."""

    def __init__(
        self, config: MegadynConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.sizes = (config, rows, length, dtype, device)
        places = -(-(length + 1) // MULTIPLE) * MULTIPLE

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return stays(torch.zeros(shape, dtype=dtype, device=device))

        heads = (cast(int, config.num_key_value_heads), places, cast(int, config.head_dim))
        self.key_BGSK, self.value_BGSK = (zeros(rows, *heads, dtype=dtype) for _ in "kv")
        self.segment_BS, self.count_B = zeros(rows, places), zeros(rows)
        self.place_BS = None if config.sliding_window is None else zeros(rows, places)
        if "ma_window" in config.routing:  # made now, because a compiled step should find all its tensors
            precise = torch.float64 if dtype == torch.float64 else torch.float32
            self.recent_BW = zeros(rows, config.routing["ma_window"] - 1, dtype=precise)
            self.last_BD = zeros(rows, config.hidden_size, dtype=dtype)
        self.is_new = True  # until the first call has ended

    def tensors(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in NAMES}
        found = {name: tensor for name, tensor in own.items() if tensor is not None}
        return found | (
            {}
            if self.again is None
            else {f"again_{name}": x for name, x in self.again_static().tensors().items()}
        )

    def with_tensors(self, tensors: dict[str, Tensor], prefix: str) -> "StaticLayerCache":
        """A copy that shares nothing but these `tensors`, named as in `tensors()` behind a prefix."""
        other = copy.copy(self)
        for name in NAMES:
            if getattr(self, name) is not None:
                setattr(other, name, tensors[prefix + name])
        if self.again is not None:
            other.again = self.again_static().with_tensors(tensors, f"{prefix}again_")
        return other

    def again_static(self) -> "StaticLayerCache":
        return cast(StaticLayerCache, self.again)

    def begin_call(self) -> None:
        """Nothing: no call is undone."""

    def held(self, rows: int) -> list[int]:
        return cast(list[int], self.count_B.tolist())

    def append(
        self, key_BGCK: Tensor, value_BGCK: Tensor, new: Packed, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As in the growing cache; P is S. A layer's first call outside static shapes needs no buffer to read."""
        columns, (places, device) = new.valid_BC.shape[1], (self.key_BGSK.shape[2], key_BGCK.device)
        row_B = torch.arange(new.batch, device=device) if new.row_B is None else new.row_B
        slot_BC = self.count_B[row_B][:, None] + torch.arange(columns, device=device)
        slot_BC = torch.where(new.valid_BC, slot_BC, places - 1)
        row_B1 = row_B[:, None]
        self.key_BGSK[row_B1, :, slot_BC] = key_BGCK.transpose(1, 2).to(self.key_BGSK.dtype)
        self.value_BGSK[row_B1, :, slot_BC] = value_BGCK.transpose(1, 2).to(self.value_BGSK.dtype)
        if new.segment_BC is not None:
            self.segment_BS[row_B1, slot_BC] = new.segment_BC
        if window is not None:
            assert self.place_BS is not None
            self.place_BS[row_B1, slot_BC] = places_of(new)
        self.count_B.index_add_(0, row_B, new.counted())
        if self.is_new and not new.is_static:
            return key_BGCK, value_BGCK, mask_inside(new, window)
        mask_BCS = self.mask_of(slot_BC, new, window)
        key_BGSK, value_BGSK = (take_rows(x, new) for x in (self.key_BGSK, self.value_BGSK))
        return key_BGSK.to(key_BGCK.dtype), value_BGSK.to(value_BGCK.dtype), mask_BCS

    def mask_of(self, slot_BC: Tensor, new: Packed, window: int | None) -> Tensor:
        """[rows, C, S]: what each new token sees. Columns without a token see everything, lest they give NaN."""
        mask_BCS = torch.arange(self.key_BGSK.shape[2], device=slot_BC.device) <= slot_BC[..., None]
        is_empty_BC1 = ~new.valid_BC[..., None]
        if new.segment_BC is not None:
            is_inside_BCS = take_rows(self.segment_BS, new)[:, None, :] == new.segment_BC[..., None]
            mask_BCS = mask_BCS & (is_inside_BCS | is_empty_BC1)
        if window is not None:
            is_near_BCS = is_near(places_of(new), take_rows(cast(Tensor, self.place_BS), new), window)
            mask_BCS = mask_BCS & (is_near_BCS | is_empty_BC1)
        return mask_BCS

    def keep_latest(self, name: str, value_BC: Tensor, before: Tensor, new: Packed) -> None:
        latest = at_last(value_BC, new, before)
        if getattr(self, name) is None:
            setattr(self, name, stays(latest.new_zeros(new.batch, *latest.shape[1:])))
        held: Tensor = getattr(self, name)
        if new.row_B is None:
            held.copy_(latest)
        else:
            held.index_copy_(0, new.row_B, latest.to(held.dtype))

    def continues(self, new: Packed) -> Tensor:
        count_B = take_rows(self.count_B, new)
        if new.segment_BC is None:
            return count_B > 0
        last_B1 = take_rows(self.segment_BS, new).gather(1, (count_B - 1).clamp(min=0)[:, None])
        return (count_B > 0) & (last_B1[:, 0] == new.segment_BC[:, 0])

    def second(self) -> LayerCache:
        if self.again is None:
            self.again = StaticLayerCache(*self.sizes)
            self.again.is_new = self.is_new
        return self.again

    def end_call(self) -> None:
        self.is_new = False
        if self.again is not None:
            self.again_static().end_call()

    def replace(self, change: Any) -> None:
        """Gives each tensor the values of `change(tensor)`, in place if the shape is the same."""
        for name in NAMES:
            if getattr(self, name) is not None:
                setattr(self, name, in_place(getattr(self, name), change(getattr(self, name))))
        if self.again is not None:
            self.again_static().replace(change)


def in_place(old: Tensor, new: Tensor) -> Tensor:
    """`old` with the values of `new`, or `new` if it has another shape."""
    return old.copy_(new) if old.shape == new.shape else stays(new)


def stays(tensor: Tensor) -> Tensor:
    """Tells CUDA graphs that the tensor is changed in place and need not be copied into the graph's own memory."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


class MegadynStaticCache(MegadynCache):
    """For `rows` sequences of at most `length` columns, padding included. The address of no tensor changes.

    Calls of one column per row are computed in static shapes, longer ones as with the growing cache, so that a prompt costs
    what its kept tokens cost; with `config.routing_static` all are. Cannot be cropped, nor hold gradients.
    """

    layers: list[StaticLayerCache]  # type: ignore[assignment]  # always of this class here

    def __init__(
        self,
        config: MegadynConfig,
        rows: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = (config, rows, length, dtype, torch.device(device))
        Cache.__init__(self, layers=[StaticLayerCache(*sizes) for _ in range(config.num_hidden_layers)])
        self.length = length
        self.column_count = stays(torch.zeros((), dtype=torch.long, device=device))
        self.seen_B = stays(torch.zeros(rows, dtype=torch.long, device=device))
        start = Texts.at_start(rows, torch.device(device))
        self.texts = Texts(*(stays(x.clone()) for x in start if x is not None))
        self.is_new = True

    def tensors(self) -> dict[str, Tensor]:
        """All that a call changes, by a name that can be a buffer's."""
        assert self.texts is not None
        own = {"column_count": self.column_count, "seen_B": self.seen_B}
        own |= {f"text_{name}": x for name, x in self.texts._asdict().items() if x is not None}
        return own | {
            f"layer_{i}_{name}": x
            for i, layer in enumerate(self.layers)
            for name, x in layer.tensors().items()
        }

    def with_tensors(self, tensors: dict[str, Tensor]) -> "MegadynStaticCache":
        """The same cache over other tensors, named as in `tensors()`."""
        assert self.texts is not None
        other = copy.copy(self)
        other.column_count, other.seen_B = tensors["column_count"], tensors["seen_B"]
        other.texts = Texts(**{name: tensors.get(f"text_{name}") for name in self.texts._fields})  # type: ignore[arg-type]  # only `segment_B` may lack
        other.layers = [layer.with_tensors(tensors, f"layer_{i}_") for i, layer in enumerate(self.layers)]
        return other

    @property
    def rows(self) -> int:
        return len(self.seen_B)

    @property
    def is_begun(self) -> bool:
        return not self.is_new

    def begin_rows(self, rows: int) -> None:
        """Nothing: the cache was made for its rows."""

    def going_on(self, device: torch.device) -> Tensor:
        return self.seen_B > 0

    def begin_call(self) -> None:
        """Nothing: no call is undone."""

    def make_room(self, columns: int, is_static: bool) -> None:
        """Raises ValueError for more columns than there is room for; RuntimeError if the host may not look."""
        message = f"the cache has room for {self.length} columns, which this call exceeds: make it with a larger length"
        if is_static:
            torch._assert_async(self.column_count + columns <= self.length, message)
        elif int(self.column_count) + columns > self.length:
            raise ValueError(message)

    def check_positions(self, cache_position: Tensor) -> None:
        """Raises RuntimeError, when the device comes to it, for positions that are not the next columns."""
        wanted = self.column_count + torch.arange(len(cache_position), device=cache_position.device)
        message = "cache_position: must start at the number of columns in the cache"
        torch._assert_async((cache_position == wanted).all(), message)

    def advance(self, call: Call) -> None:
        assert self.texts is not None
        self.column_count.add_(call.columns)
        self.seen_B.add_(call.tokens.counted())
        now = call.texts(call.tokens)
        for old, new in zip(self.texts, now, strict=True):
            if old is not None and new is not None:
                old.copy_(new)
        if self.texts.segment_B is None:  # later calls always have one, lest their graph differ
            segment_B = torch.zeros_like(self.seen_B) if now.segment_B is None else now.segment_B.clone()
            self.texts = self.texts._replace(segment_B=stays(segment_B))
        if self.is_new:
            self.is_new = False
            for layer in self.layers:
                layer.end_call()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.column_count)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.length

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a static cache cannot be cropped: assisted decoding needs the growing cache")

    def reset(self) -> None:
        assert self.texts is not None
        for tensor in self.tensors().values():
            tensor.zero_()
        self.texts, self.is_new = self.texts._replace(segment_B=None), True
        for layer in self.layers:
            layer.is_new = True
            if layer.again is not None:
                layer.again_static().is_new = True

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.texts is not None
        row_B = indices.to(self.seen_B.device)

        def selected(x: Tensor) -> Tensor:
            return x.index_select(0, row_B)

        self.seen_B = in_place(self.seen_B, selected(self.seen_B))
        moved = [None if x is None else in_place(x, selected(x)) for x in self.texts]
        self.texts = Texts(*moved)  # type: ignore[arg-type]  # None only where it was
        for layer in self.layers:
            layer.replace(selected)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))


class MegadynStep(nn.Module):
    """One decoding step with a static cache that holds the prompt, for `torch.export.export(step, (ids,))`, ids [B, 1]: gives
    logits [B, 1, vocabulary]. The cache's tensors are buffers, which each step changes."""

    def __init__(self, model: nn.Module, cache: MegadynStaticCache) -> None:
        super().__init__()
        if not cache.is_begun:
            raise ValueError("the cache holds no prompt yet: call the model with it first")
        self.model, self.cache = model, cache
        self.names = list(cache.tensors())
        for name, tensor in cache.tensors().items():
            self.register_buffer(f"cache_{name}", tensor, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        # From the buffers, which stand for the cache's tensors while a program is traced.
        cache = self.cache.with_tensors({name: self.get_buffer(f"cache_{name}") for name in self.names})
        output = self.model(input_ids, past_key_values=cache, use_cache=True)
        return cast(Tensor, output.logits)
