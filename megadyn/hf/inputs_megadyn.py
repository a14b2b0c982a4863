"""Interprets the arguments of a model call: mask, sequences, documents, and where each row continues.

Stand-alone: ships with the weights and imports nothing from megadyn.
"""

# Dims: B rows, T columns as given, C packed columns, D hidden, L columns seen so far.

from typing import Any, cast

import torch
from torch import Tensor

from .cache_megadyn import Call, MegadynCache, Texts
from .configuration_megadyn import MegadynConfig
from .layers_megadyn import Context
from .packing_megadyn import (
    Borders,
    Packed,
    changes,
    first_columns,
    pack,
    restarts,
    sequence_ids,
    take,
    whole,
)
from .rope_megadyn import rotary_table
from .static_megadyn import MegadynStaticCache

SILENT_VALUES = {"is_causal": (None, True), "output_router_logits": (None, False), "cache_position": (None,)}
"""Keywords that transformers may pass, with the values that change nothing."""


def refuse_unknown(keywords: dict[str, Any], cache: "MegadynCache | None", columns: int) -> None:
    """Raises an error for a keyword that the model does not implement, rather than ignore it."""
    for name, value in keywords.items():
        if name not in SILENT_VALUES:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if name == "cache_position" and isinstance(cache, MegadynStaticCache) and value is not None:
            cache.check_positions(value)
        elif name == "cache_position" and value is not None:
            past = 0 if cache is None else cache.get_seq_length()
            if value.tolist() != list(range(past, past + columns)):
                raise ValueError(f"cache_position: must start at {past}, the number of columns in the cache")
        elif not any(value is silent for silent in SILENT_VALUES[name]):
            raise ValueError(f"{name} = {value!r}: this model supports only {SILENT_VALUES[name][-1]}")


def mask_of_call(attention_mask: Tensor | None, x_BTD: Tensor, cache: MegadynCache | None) -> Tensor | None:
    """Which columns hold real tokens, [B, L] with those in the cache, or [B, T] if the given mask has only these; None: all.
    ValueError for a mask of another width, whose columns could be anyone's."""
    if attention_mask is None:
        return None
    rows, columns = x_BTD.shape[:2]
    if isinstance(cache, MegadynStaticCache):
        if tuple(attention_mask.shape) != (rows, columns):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}: with a static cache it must be "
                f"[{rows}, {columns}], of the new columns alone"
            )
        return attention_mask != 0
    past = 0 if cache is None else cache.columns
    if tuple(attention_mask.shape) not in ((rows, columns), (rows, past + columns)):
        with_cache = f" or, with those in the cache, [{rows}, {past + columns}]" if past else ""
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: must be [{rows}, {columns}]{with_cache}"
        )
    return attention_mask != 0


def sequences_of_call(
    cu_seq_lens: tuple[Tensor | None, Tensor | None],
    max_lengths: tuple[int | None, int | None],
    seq_idx: Tensor | None,
    x_BTD: Tensor,
    cache: MegadynCache | None,
) -> Tensor | None:
    """Sequence numbers [B, T], which differ between neighbouring sequences. None if the call describes no sequences.

    Args:
        cu_seq_lens: for queries and keys; the two must be equal. max_lengths: likewise.
    """
    if max_lengths != (None, None) and cu_seq_lens == (None, None):
        raise ValueError("max_length_q and max_length_k need cu_seq_lens_q and cu_seq_lens_k")
    lengths, max_length = both_equal("cu_seq_lens", *cu_seq_lens), both_equal("max_length", *max_lengths)
    if lengths is None and seq_idx is None:
        return None
    if cache is not None and cache.is_begun:
        raise ValueError(
            "cu_seq_lens_q and seq_idx describe whole sequences: give them without past_key_values"
        )
    if lengths is None:
        return cast(Tensor, seq_idx).expand(x_BTD.shape[0], -1)
    ids_BT = sequence_ids(lengths, max_length, *x_BTD.shape[:2])
    if seq_idx is not None and not torch.equal(changes(ids_BT), changes(seq_idx.expand_as(ids_BT))):
        raise ValueError("seq_idx and cu_seq_lens_q: must describe the same sequences")
    return ids_BT


def both_equal(name: str, of_queries: Any, of_keys: Any) -> Any:
    """The common value of both, or the one that was given. Raises ValueError if they differ."""
    if of_queries is None or of_keys is None:
        return of_keys if of_queries is None else of_queries
    if not torch.equal(torch.as_tensor(of_queries), torch.as_tensor(of_keys)):
        raise ValueError(
            f"{name}_k differs from {name}_q: tokens attend to their own sequence only, so both must be equal"
        )
    return of_queries


def static_of_call(
    config: MegadynConfig,
    cache: MegadynCache | None,
    columns: int,
    attentions: bool = False,
    lengths: Tensor | None = None,
) -> bool:
    """Whether the call is computed in static shapes. Raises ValueError for what cannot be done so, or with a static cache."""
    is_static_cache = isinstance(cache, MegadynStaticCache)
    if not (config.routing_static or is_static_cache):
        return False
    if attentions:
        raise ValueError(
            "output_attentions = True: must be asked for without routing_static and without a static cache"
        )
    if lengths is not None and config.routing_static:
        raise ValueError(
            "cu_seq_lens_q with routing_static = True: give seq_idx, which need not be read to check it"
        )
    if is_static_cache and torch.is_grad_enabled():
        raise ValueError("a static cache holds no gradients: call the model under torch.no_grad()")
    if cast(dict[str, Any], config.rope_parameters)["rope_type"] == "dynamic":
        raise ValueError(
            "rope_type = 'dynamic': must be computed without routing_static and without a static cache, because its "
            "base follows from the length of texts, which only the device knows"
        )
    if cache is not None and not is_static_cache:
        raise ValueError(
            "config.routing_static = True: past_key_values must be a MegadynStaticCache, because the other cache "
            "grows with what layers choose"
        )
    return config.routing_static or columns == 1


def tokens_of_call(mask_BL: Tensor | None, x_BTD: Tensor, is_static: bool = False) -> Packed:
    """The real tokens of each row. Without a mask, or in static shapes, without waiting for the device. `mask_BL`: see
    `mask_of_call`."""
    rows, columns = x_BTD.shape[:2]
    if mask_BL is None:
        return whole(rows, columns, x_BTD.device, is_static)
    return pack(mask_BL[:, -columns:], all_rows=True, static=is_static)


def borders_of_call(
    config: MegadynConfig,
    tokens: Packed,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    sequence_BT: Tensor | None,
    before: Texts,
    goes_on_B: Tensor,
) -> Borders | None:
    """`goes_on_B`: rows with tokens in the cache; other arguments as in `context_of_call`. None: no border is possible."""
    if position_ids is None and sequence_BT is None and not config.document_mask:
        return None
    sequence_BC: Tensor = torch.zeros_like(tokens.valid_BC)
    ended_BC: Tensor = torch.zeros_like(tokens.valid_BC)
    if position_ids is not None:
        sequence_BC |= restarts(take(position_ids, tokens), tokens.columns(), goes_on_B)
    if sequence_BT is not None:
        sequence_BC |= changes(take(sequence_BT, tokens))
    text_BC = sequence_BC
    if config.document_mask:
        if input_ids is None:
            raise ValueError(
                "config.document_mask = True: give input_ids, because inputs_embeds do not show where a "
                "document ends"
            )
        ended_BC = take(input_ids, tokens).eq(cast(int, config.eod_token_id))
        ended_before_B = before.ended_B & goes_on_B
        text_BC = sequence_BC | torch.cat((ended_before_B[:, None], ended_BC[:, :-1]), dim=1)
    return Borders(sequence_BC & tokens.valid_BC, text_BC & tokens.valid_BC, ended_BC)


def context_of_call(
    config: MegadynConfig,
    x_BTD: Tensor,
    tokens: Packed,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    sequence_BT: Tensor | None,
    cache: MegadynCache | None,
    topk: bool = False,
    attentions: bool = False,
) -> tuple[Context, Call]:
    """What the layers share, and what a cache must remember of this call. `sequence_BT`: see `sequences_of_call`."""
    rows, device = x_BTD.shape[0], x_BTD.device
    before = Texts.at_start(rows, device) if cache is None or cache.texts is None else cache.texts
    goes_on_B = (
        torch.zeros(rows, dtype=torch.bool, device=device) if cache is None else cache.going_on(device)
    )
    if position_ids is not None:
        position_ids = position_ids.expand(rows, -1)
    borders = borders_of_call(config, tokens, input_ids, position_ids, sequence_BT, before, goes_on_B)
    column_C = torch.arange(tokens.valid_BC.shape[1], device=device)
    first_BC = None if borders is None else first_columns(borders.text_BC)

    def counted_from(start_B: Tensor) -> Tensor:
        counted_BC = start_B[:, None] + column_C
        return counted_BC if first_BC is None else torch.where(first_BC < 0, counted_BC, column_C - first_BC)

    place_BC = counted_from(before.place_B)
    position_BC = counted_from(before.position_B) if position_ids is None else take(position_ids, tokens)
    sequence_BC, continues_B = None, goes_on_B
    if borders is not None:
        continues_B = goes_on_B & ~borders.text_BC[:, 0]
    if before.segment_B is not None or (borders is not None and (tokens.is_static or borders.text_BC.any())):
        begins_BC = torch.zeros_like(tokens.valid_BC) if borders is None else borders.text_BC
        segment_BC = begins_BC.cumsum(1)
        if before.segment_B is not None:
            segment_BC = segment_BC + before.segment_B[:, None]
        tokens = tokens._replace(segment_BC=segment_BC)
        sequence_BC = None if borders is None else borders.sequence_BC.cumsum(1)
    if (
        cast(dict[str, Any], config.rope_parameters)["rope_type"] == "dynamic"
        and tokens.segment_BC is not None
    ):
        raise ValueError(
            "rope_type = 'dynamic': give each text a row of its own, because the base follows from a text's length"
        )
    cos_BCK, sin_BCK = rotary_table(config, position_BC, tokens.valid_BC, x_BTD.dtype)
    # To layers they stand where they have been pushed.
    packed = tokens._replace(index_BC=None, place_BC=None if config.sliding_window is None else place_BC)
    context = Context(packed, cos_BCK, sin_BCK, continues_B, topk, place_BC, sequence_BC, attentions)
    ended_BC = None if borders is None else borders.ended_BC
    return context, Call(x_BTD.shape[1], tokens, before, position_BC, place_BC, ended_BC)
