"""The layers that exported models share: packed tokens, the cache, the dense transformer layer, and choosing tokens.

Stand-alone: shipped beside the weights, imports nothing of megadyn. `modeling_megadyn.py` explains the packing; the layers of
the export's own kind of routing stand in `routing_<kind>.py`.
"""

# Dims: B rows, T columns as given, C packed columns, D hidden, H query heads, G key/value heads, K head size,
#       P packed tokens in a layer's cache, W moving-average window, L columns seen so far.

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_megadyn import MegadynConfig

# ---- packing -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Some tokens of each row, pushed to the left in their order. Columns beyond a row's count hold other tokens."""

    index_BC: Tensor  # the column each came from; distinct in a row
    valid_BC: Tensor  # False beyond the row's count
    counts: list[int]  # per row
    # the text each belongs to, which attention must not leave; None: each row is one
    segment_BC: Tensor | None = None


def pack(mask_BT: Tensor, least: int = 0, segment_BT: Tensor | None = None) -> Packed:
    """The tokens where the mask is True, in as many columns as the longest row needs, and at least `least`."""
    counts = mask_BT.sum(1).tolist()
    width = max(least, *counts)
    index_BT = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    valid_BT = (
        torch.arange(width, device=mask_BT.device) < torch.tensor(counts, device=mask_BT.device)[:, None]
    )
    segment_BC = None if segment_BT is None else segment_BT.gather(1, index_BT[:, :width])
    return Packed(index_BT[:, :width], valid_BT, counts, segment_BC)


def take(x: Tensor, packed: Packed) -> Tensor:
    """[B, T, ...] -> [B, C, ...]."""
    return x.gather(1, _over_columns(packed.index_BC, x).expand(-1, -1, *x.shape[2:]))


def put_back(base: Tensor, packed: Packed, x: Tensor) -> Tensor:
    """`base` [B, T, ...] with its packed tokens replaced by `x` [B, C, ...]."""
    new = torch.where(_over_columns(packed.valid_BC, x), x, take(base, packed))
    return base.scatter(1, _over_columns(packed.index_BC, x).expand_as(x), new)


def _over_columns(per_column_BC: Tensor, x: Tensor) -> Tensor:
    """[B, C] with as many dimensions as `x` [B, C or T, ...]."""
    return per_column_BC.view(*per_column_BC.shape, *[1] * (x.dim() - 2))


def best_of_each_row(
    score_BC: Tensor, tokens: Packed, capacity: float, sequence_BC: Tensor | None = None
) -> Tensor:
    """Mask [B, C] of exactly k = max(1, floor(capacity * tokens)) best scores of each sequence; ties go to the earlier token.

    `sequence_BC` numbers the sequences of a row, rising; None if each row is one.
    """
    columns = score_BC.shape[1]
    if sequence_BC is None:
        sequence_BC = torch.zeros_like(tokens.index_BC)
    sequence_BC = sequence_BC.masked_fill(~tokens.valid_BC, columns)  # behind all others
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
    """Sequences [B, T] by running lengths [sequences + 1] over the flattened batch, as FlashAttention takes them."""
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
        raise ValueError("cu_seq_lens_q: a sequence must not go on in the next row")
    return ids_BT


class Borders(NamedTuple):
    """Where texts begin and end among the packed tokens of a call; masks [B, C]. The first token of a row counts only if
    earlier calls gave the row others."""

    sequence_BC: Tensor  # begins a sequence
    text_BC: Tensor  # begins a sequence or a document
    ended_BC: Tensor  # ends a document


def changes(x_BC: Tensor) -> Tensor:
    """Mask [B, C] of the values that differ from the one before in their row."""
    changed_BC = torch.zeros_like(x_BC, dtype=torch.bool)
    changed_BC[:, 1:] = x_BC[:, 1:] != x_BC[:, :-1]
    return changed_BC


def restarts(position_BC: Tensor, column_BC: Tensor, goes_on_B: Tensor) -> Tensor:
    """Mask [B, C] of the tokens that begin a sequence: those whose position does not go on from the one before, neither as
    the tokens do nor, where padding lies between, as the columns do. The first token of a row with tokens in the cache
    (`goes_on_B`) begins one if its position is 0."""
    step_BC = position_BC.diff(dim=1)
    begins_BC = torch.zeros_like(position_BC, dtype=torch.bool)
    begins_BC[:, 1:] = (step_BC != 1) & (step_BC != column_BC.diff(dim=1))
    begins_BC[:, 0] = goes_on_B & (position_BC[:, 0] == 0)
    return begins_BC


def first_columns(begins_BC: Tensor) -> Tensor:
    """[B, C] the column at which the text of each token begins; -1 if in an earlier call."""
    column_C = torch.arange(begins_BC.shape[1], device=begins_BC.device)
    return torch.where(begins_BC, column_C, -1).cummax(dim=1).values


def mask_inside(tokens: Packed) -> Tensor | None:
    """Mask [B, C, C] by which each token sees those before it in its own text; None: all before it in the row."""
    if tokens.segment_BC is None:
        return None
    return (tokens.segment_BC[:, :, None] == tokens.segment_BC[:, None, :]).tril()


# ---- cache ---------------------------------------------------------------------------------------


class LayerCache:
    """Keys and values of the tokens that one layer processed, packed; layers that score by surprise keep what it needs too."""

    def __init__(self) -> None:
        self.key_BPGK: Tensor | None = None
        self.value_BPGK: Tensor | None = None
        self.segment_BP: Tensor | None = None  # the text each belongs to; None: each row is one
        self.recent_BW: Tensor | None = None  # the W - 1 latest static surprises
        self.last_BD: Tensor | None = None  # what the layer made of its latest token
        self.again: LayerCache | None = None  # of the second time, where a layer processes tokens twice
        self.counts: list[int] = []  # tokens held, per row

    def append(
        self, key_BCGK: Tensor, value_BCGK: Tensor, new: Packed
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the new tokens; returns the keys, values and mask [B, C, P] that they attend with (None: all before them)."""
        is_first = self.key_BPGK is None
        before = [0] * len(new.counts) if is_first else self.counts
        self.counts = [old + count for old, count in zip(before, new.counts, strict=True)]
        row, column = new.valid_BC.nonzero(as_tuple=True)
        before_B = torch.tensor(before, device=key_BCGK.device)
        slot = before_B[row] + column
        self.key_BPGK = self._grown(self.key_BPGK, key_BCGK)
        self.value_BPGK = self._grown(self.value_BPGK, value_BCGK)
        self.key_BPGK[row, slot] = key_BCGK[row, column]
        self.value_BPGK[row, slot] = value_BCGK[row, column]
        if new.segment_BC is not None:
            # what came before the first border is text 0
            self.segment_BP = self._grown(self.segment_BP, new.segment_BC)
            self.segment_BP[row, slot] = new.segment_BC[row, column]
        if is_first:
            return key_BCGK, value_BCGK, mask_inside(new)
        last_BC = before_B[:, None] + torch.arange(key_BCGK.shape[1], device=key_BCGK.device)
        mask_BCP = torch.arange(self.key_BPGK.shape[1], device=key_BCGK.device) <= last_BC[..., None]
        if new.segment_BC is not None and self.segment_BP is not None:
            is_inside_BCP = self.segment_BP[:, None, :] == new.segment_BC[..., None]
            # a query that sees nothing would give NaN
            mask_BCP = mask_BCP & (is_inside_BCP | ~new.valid_BC[..., None])
        return self.key_BPGK, self.value_BPGK, mask_BCP

    def continues(self, new: Packed) -> Tensor:
        """Rows [B] whose first new token belongs to the text of the last token held."""
        if self.key_BPGK is None:
            return new.valid_BC.new_zeros(len(new.counts))
        count_B = torch.tensor(self.counts, device=new.valid_BC.device)
        if new.segment_BC is None:
            return count_B > 0
        last_B = torch.zeros_like(new.segment_BC[:, 0])  # text 0 while each row was one
        if self.segment_BP is not None:
            last_B = self.segment_BP.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0]
        return (count_B > 0) & (last_B == new.segment_BC[:, 0])

    def second(self) -> "LayerCache":
        """Keys and values of the tokens that the layer processed once more."""
        self.again = self.again or LayerCache()
        return self.again

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        """A copy of `old` with room for the longest row."""
        grown = like.new_zeros(like.shape[0], max(self.counts), *like.shape[2:])
        if old is not None:
            grown[:, : old.shape[1]] = old
        return grown

    def select_rows(self, rows: list[int]) -> None:
        if self.again is not None:
            self.again.select_rows(rows)
        if self.recent_BW is not None:
            self.recent_BW = self.recent_BW[rows]
        if self.last_BD is not None:
            self.last_BD = self.last_BD[rows]
        if self.key_BPGK is not None and self.value_BPGK is not None:
            self.counts = [self.counts[row] for row in rows]
            longest = max(self.counts)  # the row that was longest may be gone
            self.key_BPGK, self.value_BPGK = self.key_BPGK[rows, :longest], self.value_BPGK[rows, :longest]
            if self.segment_BP is not None:
                self.segment_BP = self.segment_BP[rows, :longest]


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

    def select_rows(self, rows: list[int]) -> "Texts":
        segment_B = None if self.segment_B is None else self.segment_B[rows]
        return Texts(self.position_B[rows], self.place_B[rows], self.ended_B[rows], segment_B)


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
        self.seen = [self.seen[row] for row in rows]
        if self.texts is not None:
            self.texts = self.texts.select_rows(rows)
        for layer in self.layers:
            layer.select_rows(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))


# ---- one transformer layer -----------------------------------------------------------------------


class Stream(NamedTuple):
    """What a layer hands to the next."""

    hidden_BCD: Tensor
    score_BC: Tensor | None = None  # DTF: a decision layer's r = -log(1 - G) for its dynamic layer


class Routing(NamedTuple):
    """What a layer did, for reports."""

    processed_BC: Tensor
    gate_BC: Tensor | None = None
    weight_BHCP: Tensor | None = None  # attention weights, if asked for


class Context(NamedTuple):
    """What all layers of one call share."""

    tokens: Packed  # the real tokens of each row
    cos_BCK: Tensor
    sin_BCK: Tensor
    continues_B: Tensor  # rows whose first token goes on with a text of earlier calls
    topk: bool
    place_BC: Tensor  # of each token in its text, from 0
    sequence_BC: Tensor | None = None  # what top-k counts over; None: each row
    attentions: bool = False  # whether layers return attention weights


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is: the precision of norms, surprises, gates and thresholds."""
    return x if x.dtype == torch.float64 else x.float()


def rotary_table(
    position_BC: Tensor, head_size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, C, K] of rotary positions, computed in at least float32."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_size, 2, device=position_BC.device).to(precision) / head_size
    angle = position_BC.to(precision)[..., None] * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BCHK: Tensor, cos_BCK: Tensor, sin_BCK: Tensor) -> Tensor:
    """Dimension i turns with dimension i + K/2, Qwen2's convention."""
    first, second = x_BCHK.chunk(2, dim=-1)
    return x_BCHK * cos_BCK.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin_BCK.unsqueeze(2)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Averages [B, C, H, K] and weights [B, H, C, P] of grouped-query attention, in the form of transformers' own functions:
    query [B, H, C, K], key and value [B, G, P, K], mask [B, 1, C, P] of bool; without one it is causal, and P = C."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if attention_mask is None:
        attention_mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()
    score = wide(query @ key.transpose(2, 3) * scaling).masked_fill(~attention_mask, -math.inf)
    weight = score.softmax(dim=-1).to(query.dtype)
    return (weight @ value).transpose(1, 2), weight


class MegadynRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.scale = eps, scale

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * (self.scale * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps))
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.config = config
        self.head_size = cast(int, config.head_dim)
        q_size = config.num_attention_heads * self.head_size
        kv_size = cast(int, config.num_key_value_heads) * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.num_key_value_groups = q_size // kv_size
        # read by transformers' attention functions
        self.scaling, self.is_causal = self.head_size**-0.5, True
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        hybrid = config.normalization == "hybridnorm"
        self.q_norm, self.k_norm, self.v_norm = (
            MegadynRMSNorm(self.head_size, config.rms_norm_eps) if hybrid else nn.Identity() for _ in range(3)
        )

    def values(self, x_BCD: Tensor) -> Tensor:
        """V(x) [B, C, G, K]."""
        return self.v_norm(self.v_proj(x_BCD).unflatten(-1, (-1, self.head_size)))

    def mix(
        self,
        x_BCD: Tensor,
        v_BCGK: Tensor,
        cos_BCK: Tensor,
        sin_BCK: Tensor,
        tokens: Packed,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Each head's average of values [B, C, H, K], the output projection's input, and attention's weights [B, H, C, P] if
        the implementation gives them."""
        heads = (-1, self.head_size)
        q_BCHK = rotate(self.q_norm(self.q_proj(x_BCD).unflatten(-1, heads)), cos_BCK, sin_BCK)
        k_BPGK = rotate(self.k_norm(self.k_proj(x_BCD).unflatten(-1, heads)), cos_BCK, sin_BCK)
        if cache is None:
            v_BPGK, mask_BCP = v_BCGK, mask_inside(tokens)
        else:
            k_BPGK, v_BPGK, mask_BCP = cache.append(k_BPGK, v_BCGK, tokens)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        q, k, v = (x.transpose(1, 2) for x in (q_BCHK, k_BPGK, v_BPGK))
        return attention(
            self,
            q,
            k,
            v,
            None if mask_BCP is None else mask_BCP.unsqueeze(1),
            scaling=self.scaling,
            dropout=0.0,
        )

    def forward(
        self, x_BCD: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """The projected output [B, C, D], and the weights as in `mix`."""
        mixed_BCHK, weight_BHCP = self.mix(x_BCD, self.values(x_BCD), cos_BCK, sin_BCK, tokens, cache)
        return self.o_proj(mixed_BCHK.flatten(2)), weight_BHCP


class SwiGLU(nn.Module):
    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner_size, bias=False)
        self.up_proj = nn.Linear(size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CheckpointedLayer(GradientCheckpointingLayer):
    """Recomputes in the backward pass what it computes, never what it chose: so `run` stands where transformers' class
    would wrap the whole of `forward` (by this hook, and in its early versions by `__call__`)."""

    _gradient_checkpointing_func: Callable[..., Any]  # set by PreTrainedModel
    __call__ = nn.Module.__call__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(GradientCheckpointingLayer, cls).__init_subclass__(**kwargs)

    def run(self, process: Callable[..., Any], *inputs: Any, cache: LayerCache | None) -> Any:
        """`process`, recomputed in the backward pass if asked for. Tokens are chosen outside: they are never chosen again."""
        if self.gradient_checkpointing and self.training and cache is None:
            return self._gradient_checkpointing_func(process, *inputs, None)
        return process(*inputs, cache)


class DenseLayer(CheckpointedLayer):
    """Every token goes through attention and feed-forward."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        """`number` of the layer in the model, from 1."""
        super().__init__()
        self.is_hybrid = config.normalization == "hybridnorm"
        scale = 1 / math.sqrt(number) if config.normalization == "lns" else 1.0
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = (
            nn.Identity()
            if self.is_hybrid
            else MegadynRMSNorm(config.hidden_size, config.rms_norm_eps, scale)
        )
        self.post_attention_layernorm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps, scale)

    def process(
        self, h_BCD: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """h + Block(h), and attention's weights as in `Attention.mix`."""
        update_BCD, weight_BHCP = self.self_attn(self.input_layernorm(h_BCD), cos_BCK, sin_BCK, tokens, cache)
        return self.add_mlp(h_BCD + update_BCD), weight_BHCP

    def add_mlp(self, u_BCD: Tensor) -> Tensor:
        x_BCD = self.post_attention_layernorm(u_BCD)
        return (x_BCD if self.is_hybrid else u_BCD) + self.mlp(x_BCD)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        h_BCD, weight_BHCP = self.run(
            self.process, stream.hidden_BCD, context.cos_BCK, context.sin_BCK, context.tokens, cache=cache
        )
        return Stream(h_BCD), Routing(
            context.tokens.valid_BC, weight_BHCP=weight_BHCP if context.attentions else None
        )


# ---- choosing tokens -----------------------------------------------------------------------------


class Float32Module(nn.Module):
    """Keeps its tensors in float32 through `.half()` and `.bfloat16()`: a rounded threshold routes other tokens."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.dtype in (torch.float16, torch.bfloat16) else y

        return super()._apply(moved, recurse)

    def reset(self, std: float) -> None:
        """Initial values, in place; `std` of what is drawn."""


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float32 under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(wide(x), weight, bias)


class WideLinear(Float32Module, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight, self.bias)

    def reset(self, std: float) -> None:
        """Left to transformers, which knows linear layers."""


class FixedLinear(Float32Module):
    """No bias, and no parameter: nothing here trains it, and distributed training may not leave a parameter out."""

    weight: Tensor

    def __init__(self, size: int, out_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_size, size, dtype=torch.float32))

    def reset(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight)


class ThresholdRule(Float32Module):
    """Causal stand-in for top-k: a token is routed if its score reaches the threshold."""

    threshold: Tensor

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(1, dtype=torch.float32))

    def reset(self, std: float) -> None:
        nn.init.zeros_(self.threshold)

    def forward(self, score_BT: Tensor, h_BTD: Tensor) -> Tensor:
        return score_BT >= self.threshold


class PredictorRule(nn.Module):
    """Causal stand-in for top-k: a small network that was trained to tell which tokens top-k takes."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.fc1 = FixedLinear(config.hidden_size, config.hidden_size // 2)
        self.fc2 = FixedLinear(config.hidden_size // 2, 1)

    def forward(self, score_BT: Tensor, h_BTD: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(h_BTD.detach()))).squeeze(-1).sigmoid() >= 0.5


class ConstantRule(nn.Module):
    """A token is routed if its score exceeds 0: a logit trained by cross-entropy, a difference of logits, a score that is not
    learned."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()

    def forward(self, score_BT: Tensor, h_BTD: Tensor) -> Tensor:
        return score_BT > 0


CAUSAL_RULES = {
    "threshold": ThresholdRule,
    "predictor": PredictorRule,
    "bce": ConstantRule,
    "sign": ConstantRule,
    "token_choice": ConstantRule,
}


class RoutedLayer(DenseLayer):
    """Only chosen tokens are processed, and attend to each other; the rest pass."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.capacity = config.routing.get("capacity")
        self.causal_router = CAUSAL_RULES[config.routing["causal"]](config)

    def choose(self, score_BT: Tensor, h_BTD: Tensor, context: Context) -> Tensor:
        if context.topk:
            return best_of_each_row(score_BT, context.tokens, cast(float, self.capacity), context.sequence_BC)
        return self.causal_router(score_BT, h_BTD) & context.tokens.valid_BC

    def route(
        self, h_BTD: Tensor, score_BT: Tensor, gate_BT: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Stream, Routing]:
        """h + gate * Block(h) for the tokens that the score selects, h for the rest."""
        routing = Routing(self.choose(score_BT.detach(), h_BTD, context), score_BT.detach())
        chosen = pack(routing.processed_BC, segment_BT=context.tokens.segment_BC)
        if not any(chosen.counts):
            return Stream(h_BTD), routing
        h_BCD, cos_BCK, sin_BCK = (take(x, chosen) for x in (h_BTD, context.cos_BCK, context.sin_BCK))
        processed_BCD, _ = self.run(self.process, h_BCD, cos_BCK, sin_BCK, chosen, cache=cache)
        h_BCD = h_BCD + take(gate_BT, chosen).unsqueeze(-1) * (processed_BCD - h_BCD)
        return Stream(put_back(h_BTD, chosen, h_BCD.type_as(h_BTD))), routing
