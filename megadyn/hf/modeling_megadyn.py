"""The exported model: a Qwen2-style transformer whose routed layers process only some of the tokens.

Stand-alone: shipped beside the weights with `configuration_megadyn.py`, imports nothing of megadyn. The mathematics
is megadyn's design/routing.md; sources: the DTF thesis ("Dynamic Transformers", eqs. 3.1-3.13), Mixture-of-Depths
(arXiv 2404.02258), DTRNet (2509.00925), LayerNorm Scaling (2502.05795), HybridNorm (2503.04598), Qwen2.

One idea carries the file: tokens are PACKED. At the entrance each row's real tokens are pushed to the left, which
removes the padding; at each routed layer the chosen ones are pushed to the left again. In a packed row plain causal
attention is right whatever was left out, each token keeps its original position for RoPE, and a layer's cache holds
the packed tokens of each row: those that the layer processed, and nothing for the others.

A row may hold several texts. SEQUENCES of a padding-free batch (`position_ids` that start again, `cu_seq_lens_q`, `seq_idx`)
are independent: each is computed as if it stood alone. DOCUMENTS (`config.document_mask`, for models trained so) end with
`eod_token_id` and are parts of one sequence: attention and averages stay inside a document, but top-k counts over the sequence.

A new kind of layer is a subclass of DenseLayer or RoutedLayer in LAYERS, a new causal rule a class in CAUSAL_RULES;
their keys go in the configuration's tables.
"""

# Dims: B rows, T columns as given, C packed columns, D hidden, H query heads, G key/value heads, K head size,
#       P packed tokens in a layer's cache, W moving-average window, L columns seen so far.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_megadyn import ROUTING_MODES, MegadynConfig, check_rotary, has_topk, one_of

# ---- packing -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Some tokens of each row, pushed to the left in their order. Columns beyond a row's count hold other tokens."""

    index_BC: Tensor      # the column each came from; distinct in a row
    valid_BC: Tensor      # False beyond the row's count
    counts: list[int]     # per row
    segment_BC: Tensor | None = None      # the text each belongs to, which attention must not leave; None: each row is one


def pack(mask_BT: Tensor, least: int = 0, segment_BT: Tensor | None = None) -> Packed:
    """The tokens where the mask is True, in as many columns as the longest row needs, and at least `least`."""
    counts = mask_BT.sum(1).tolist()
    width = max(least, *counts)
    index_BT = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    valid_BT = torch.arange(width, device=mask_BT.device) < torch.tensor(counts, device=mask_BT.device)[:, None]
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


def best_of_each_row(score_BC: Tensor, tokens: Packed, capacity: float, sequence_BC: Tensor | None = None) -> Tensor:
    """Mask [B, C] of exactly k = max(1, floor(capacity * tokens)) best scores of each sequence; ties go to the earlier token.

    `sequence_BC` numbers the sequences of a row, rising; None if each row is one.
    """
    columns = score_BC.shape[1]
    if sequence_BC is None:
        sequence_BC = torch.zeros_like(tokens.index_BC)
    sequence_BC = sequence_BC.masked_fill(~tokens.valid_BC, columns)      # behind all others
    best_first_BC = score_BC.masked_fill(~tokens.valid_BC, -math.inf).argsort(dim=1, descending=True, stable=True)
    by_sequence_BC = sequence_BC.gather(1, best_first_BC).argsort(dim=1, stable=True)
    best_first_BC = best_first_BC.gather(1, by_sequence_BC)
    sorted_BC = sequence_BC.gather(1, best_first_BC)
    start_BC, end_BC = (torch.searchsorted(sorted_BC, sorted_BC, right=right) for right in (False, True))
    wanted = torch.tensor([max(1, math.floor(capacity * count)) for count in range(columns + 1)], device=score_BC.device)
    rank_BC = torch.arange(columns, device=score_BC.device) - start_BC
    chosen_BC = rank_BC < wanted[end_BC - start_BC]
    return torch.zeros_like(tokens.valid_BC).scatter(1, best_first_BC, chosen_BC) & tokens.valid_BC


# ---- sequences and documents ---------------------------------------------------------------------


def sequence_ids(cu_seq_lens: Tensor, max_length: int | Tensor | None, rows: int, columns: int) -> Tensor:
    """Sequences [B, T] by running lengths [sequences + 1] over the flattened batch, as FlashAttention takes them."""
    total = rows * columns
    if cu_seq_lens.dim() != 1 or cu_seq_lens[0] != 0 or cu_seq_lens[-1] != total or (cu_seq_lens.diff() < 0).any():
        raise ValueError(f"cu_seq_lens_q must rise from 0 to {total}, the number of tokens")
    longest = int(cu_seq_lens.diff().max())
    if max_length is not None and int(max_length) < longest:
        raise ValueError(f"max_length_q = {int(max_length)}: must be at least {longest}, the longest sequence of cu_seq_lens_q")
    place = torch.arange(total, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    ids_BT = torch.searchsorted(cu_seq_lens, place, right=True).view(rows, columns)
    if (ids_BT[1:, 0] == ids_BT[:-1, -1]).any():
        raise ValueError("cu_seq_lens_q: a sequence must not go on in the next row")
    return ids_BT


class Borders(NamedTuple):
    """Where texts begin and end among the packed tokens of a call; masks [B, C]. The first token of a row counts only if
    earlier calls gave the row others."""

    sequence_BC: Tensor      # begins a sequence
    text_BC: Tensor          # begins a sequence or a document
    ended_BC: Tensor         # ends a document


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
    """Keys and values of the tokens that one layer processed, packed; DTF decisions keep their last surprises too."""

    def __init__(self) -> None:
        self.key_BPGK: Tensor | None = None
        self.value_BPGK: Tensor | None = None
        self.segment_BP: Tensor | None = None     # the text each belongs to; None: each row is one
        self.recent_BW: Tensor | None = None      # the W - 1 latest static surprises
        self.counts: list[int] = []               # tokens held, per row

    def append(self, key_BCGK: Tensor, value_BCGK: Tensor, new: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
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
            self.segment_BP = self._grown(self.segment_BP, new.segment_BC)      # what came before the first border is text 0
            self.segment_BP[row, slot] = new.segment_BC[row, column]
        if is_first:
            return key_BCGK, value_BCGK, mask_inside(new)
        last_BC = before_B[:, None] + torch.arange(key_BCGK.shape[1], device=key_BCGK.device)
        mask_BCP = torch.arange(self.key_BPGK.shape[1], device=key_BCGK.device) <= last_BC[..., None]
        if new.segment_BC is not None and self.segment_BP is not None:
            is_inside_BCP = self.segment_BP[:, None, :] == new.segment_BC[..., None]
            mask_BCP = mask_BCP & (is_inside_BCP | ~new.valid_BC[..., None])      # a query that sees nothing would give NaN
        return self.key_BPGK, self.value_BPGK, mask_BCP

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        """A copy of `old` with room for the longest row."""
        grown = like.new_zeros(like.shape[0], max(self.counts), *like.shape[2:])
        if old is not None:
            grown[:, :old.shape[1]] = old
        return grown

    def select_rows(self, rows: list[int]) -> None:
        if self.recent_BW is not None:
            self.recent_BW = self.recent_BW[rows]
        if self.key_BPGK is not None and self.value_BPGK is not None:
            self.counts = [self.counts[row] for row in rows]
            longest = max(self.counts)      # the row that was longest may be gone
            self.key_BPGK, self.value_BPGK = self.key_BPGK[rows, :longest], self.value_BPGK[rows, :longest]
            if self.segment_BP is not None:
                self.segment_BP = self.segment_BP[rows, :longest]


class Texts(NamedTuple):
    """Where each row of a cache stands in the text that its last token belongs to."""

    position_B: Tensor               # of the next token
    ended_B: Tensor                  # whether the last token ended a document
    segment_B: Tensor | None = None  # the number of the text in its row; None while each row is one text

    @classmethod
    def at_start(cls, rows: int, device: torch.device) -> "Texts":
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(zeros, zeros.bool())

    def select_rows(self, rows: list[int]) -> "Texts":
        segment_B = None if self.segment_B is None else self.segment_B[rows]
        return Texts(self.position_B[rows], self.ended_B[rows], segment_B)


class MegadynCache(Cache):
    """A LayerCache per layer, in the form that `generate` uses. Its length counts columns, padding included."""

    layers: list[LayerCache]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerCache() for _ in range(num_layers)])
        self.columns = 0
        self.seen: list[int] = []      # real tokens so far, per row
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
        return -1      # no limit

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
    score_BC: Tensor | None = None      # DTF: a decision layer's r = -log(1 - G) for its dynamic layer


class Routing(NamedTuple):
    """What a layer did, for reports."""

    processed_BC: Tensor
    gate_BC: Tensor | None = None
    weight_BHCP: Tensor | None = None      # attention weights, if asked for


class Context(NamedTuple):
    """What all layers of one call share."""

    tokens: Packed           # the real tokens of each row
    cos_BCK: Tensor
    sin_BCK: Tensor
    continues_B: Tensor      # rows whose first token goes on with a text of earlier calls
    topk: bool
    sequence_BC: Tensor | None = None      # what top-k counts over; None: each row
    attentions: bool = False               # whether layers return attention weights


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is: the precision of norms, surprises, gates and thresholds."""
    return x if x.dtype == torch.float64 else x.float()


def rotary_table(position_BC: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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


def eager_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                    scaling: float, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Averages [B, C, H, K] and weights [B, H, C, P] of grouped-query attention, in the form of transformers' own functions:
    query [B, H, C, K], key and value [B, G, P, K], mask [B, 1, C, P] of bool; without one it is causal, and P = C."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
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
        self.scaling, self.is_causal = self.head_size ** -0.5, True      # read by transformers' attention functions
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        hybrid = config.normalization == "hybridnorm"
        self.q_norm, self.k_norm, self.v_norm = (
            MegadynRMSNorm(self.head_size, config.rms_norm_eps) if hybrid else nn.Identity() for _ in range(3))

    def values(self, x_BCD: Tensor) -> Tensor:
        """V(x) [B, C, G, K]."""
        return self.v_norm(self.v_proj(x_BCD).unflatten(-1, (-1, self.head_size)))

    def mix(self, x_BCD: Tensor, v_BCGK: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed,
            cache: LayerCache | None) -> tuple[Tensor, Tensor | None]:
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
        return attention(self, q, k, v, None if mask_BCP is None else mask_BCP.unsqueeze(1), scaling=self.scaling, dropout=0.0)

    def forward(self, x_BCD: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed,
                cache: LayerCache | None) -> tuple[Tensor, Tensor | None]:
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

    _gradient_checkpointing_func: Callable[..., Any]      # set by PreTrainedModel
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
            nn.Identity() if self.is_hybrid else MegadynRMSNorm(config.hidden_size, config.rms_norm_eps, scale))
        self.post_attention_layernorm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps, scale)

    def process(self, h_BCD: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed,
                cache: LayerCache | None) -> tuple[Tensor, Tensor | None]:
        """h + Block(h), and attention's weights as in `Attention.mix`."""
        update_BCD, weight_BHCP = self.self_attn(self.input_layernorm(h_BCD), cos_BCK, sin_BCK, tokens, cache)
        return self.add_mlp(h_BCD + update_BCD), weight_BHCP

    def add_mlp(self, u_BCD: Tensor) -> Tensor:
        x_BCD = self.post_attention_layernorm(u_BCD)
        return (x_BCD if self.is_hybrid else u_BCD) + self.mlp(x_BCD)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        h_BCD, weight_BHCP = self.run(
            self.process, stream.hidden_BCD, context.cos_BCK, context.sin_BCK, context.tokens, cache=cache)
        return Stream(h_BCD), Routing(context.tokens.valid_BC, weight_BHCP=weight_BHCP if context.attentions else None)


# ---- choosing tokens -----------------------------------------------------------------------------


class Float32Module(nn.Module):
    """Keeps its tensors in float32 through `.half()` and `.bfloat16()`: a rounded threshold routes other tokens."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.dtype in (torch.float16, torch.bfloat16) else y

        return super()._apply(moved, recurse)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float32 under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(wide(x), weight, bias)


class WideLinear(Float32Module, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight, self.bias)


class FixedLinear(Float32Module):
    """No bias, and no parameter: nothing here trains it, and distributed training may not leave a parameter out."""

    weight: Tensor

    def __init__(self, size: int, out_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_size, size, dtype=torch.float32))

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight)


class ThresholdRule(Float32Module):
    """Causal stand-in for top-k: a token is routed if its score reaches the threshold."""

    threshold: Tensor

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
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
    """A token is routed if its score exceeds 0: MoD's logit trained by cross-entropy, DTRNet's logit difference."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()

    def forward(self, score_BT: Tensor, h_BTD: Tensor) -> Tensor:
        return score_BT > 0


CAUSAL_RULES = {"threshold": ThresholdRule, "predictor": PredictorRule, "bce": ConstantRule, "token_choice": ConstantRule}


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

    def route(self, h_BTD: Tensor, score_BT: Tensor, gate_BT: Tensor, context: Context,
              cache: LayerCache | None) -> tuple[Stream, Routing]:
        """h + gate * Block(h) for the tokens that the score selects, h for the rest."""
        routing = Routing(self.choose(score_BT.detach(), h_BTD, context), score_BT.detach())
        chosen = pack(routing.processed_BC, segment_BT=context.tokens.segment_BC)
        if not any(chosen.counts):
            return Stream(h_BTD), routing
        h_BCD, cos_BCK, sin_BCK = (take(x, chosen) for x in (h_BTD, context.cos_BCK, context.sin_BCK))
        processed_BCD, _ = self.run(self.process, h_BCD, cos_BCK, sin_BCK, chosen, cache=cache)
        h_BCD = h_BCD + take(gate_BT, chosen).unsqueeze(-1) * (processed_BCD - h_BCD)
        return Stream(put_back(h_BTD, chosen, h_BCD.type_as(h_BTD))), routing


# ---- DTF -----------------------------------------------------------------------------------------


class Prior(SwiGLU):
    """PriorFFN(RMSNorm(h)): a cheap prediction of what the layer adds."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config.hidden_size, config.routing["prior_size"])
        self.norm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(self.norm(h))


class SurpriseRouter(Float32Module):
    """The score r = -log(1 - G) from the static surprise D_st, the change surprise D_ch and the moving average of D_st.

    r = softplus(a) + softplus(b), a and b being the arguments of the sigmoids that make up G: it orders tokens as G does,
    and keeps apart those whose G rounds to 1.
    """

    beta_ce: nn.Parameter
    beta_cu: nn.Parameter
    ce_offset: nn.Parameter
    ce_log_offset: nn.Parameter
    cu_multiplier: nn.Parameter

    INITIAL = {"beta_ce": -0.3, "beta_cu": -0.6, "ce_log_offset": math.log(1.025), "cu_multiplier": 1.1}

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        for name in ("beta_ce", "beta_cu", "cu_multiplier"):
            self.register_parameter(name, nn.Parameter(torch.empty(1)))
        # Exports of earlier versions hold the offset, not its logarithm: `from_pretrained` loads it as it is, then converts it.
        offset = "ce_offset" if config.routing["score"] == "gate" else "ce_log_offset"
        self.register_parameter(offset, nn.Parameter(torch.empty(1)))

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.025 if name == "ce_offset" else self.INITIAL[name])

    def log_offset(self) -> Tensor:
        return log_of_older(self.ce_offset) if "ce_offset" in self._parameters else wide(self.ce_log_offset)

    def forward(self, static_BC: Tensor, change_BC: Tensor, average_BC: Tensor) -> Tensor:
        beta_ce, beta_cu, cu_multiplier = (wide(x) for x in (self.beta_ce, self.beta_cu, self.cu_multiplier))
        a_BC = F.softplus(beta_ce) * (static_BC - change_BC + self.log_offset())
        b_BC = F.softplus(beta_cu) * (static_BC - cu_multiplier * average_BC)
        return -(F.logsigmoid(-a_BC) + F.logsigmoid(-b_BC))


def log_of_older(offset: Tensor) -> Tensor:
    """lambda_ce of an export that holds the offset itself, as earlier versions computed it."""
    return (wide(offset) + 1e-10).log()


def threshold_of_older(tau: Tensor) -> Tensor:
    """The threshold on r for one on G. One of 1 took the tokens whose G rounds to 1 in float32: those with 1 - G < 2^-25."""
    return torch.where(tau < 1, -torch.log1p(-tau), 25 * math.log(2))


def convert_older(model: "MegadynPreTrainedModel") -> None:
    """Gives a DTF export of an earlier version, as loaded, today's form: training would drive its offset below 0, to NaN.
    Where weights are offloaded it stays as it is, and runs by the older rules."""
    layers = [module for module in model.modules() if isinstance(module, SurpriseRouter | ThresholdRule)]
    offloaded = any(tensor.is_meta for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    if model.config.routing.get("score") != "gate" or offloaded:
        return
    for layer in layers:
        if isinstance(layer, ThresholdRule):
            layer.threshold.copy_(threshold_of_older(layer.threshold))
            continue
        value = layer.log_offset().detach()
        if not value.isfinite().all():
            raise ValueError(f"router.ce_offset = {layer.ce_offset.item():.3g} has no logarithm: this export gives NaN")
        layer.ce_log_offset = nn.Parameter(value.to(layer.ce_offset.dtype), layer.ce_offset.requires_grad)
        del layer.ce_offset
    model.config.routing["score"] = "log"


def convert_older_state(model: "MegadynModel", state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The same for the weights alone, in place, before `load_state_dict` puts them into a model of today's form."""
    older = [name for name in state if name.startswith(prefix) and name.endswith("router.ce_offset")]
    if model.config.routing.get("score") != "log" or not older:
        return
    for name in older:
        state[name.replace("ce_offset", "ce_log_offset")] = log_of_older(state.pop(name))
    for name in list(state):
        if name.startswith(prefix) and name.endswith("causal_router.threshold"):
            state[name] = threshold_of_older(state[name])


def moving_average(value_BC: Tensor, window: int, context: Context, cache: LayerCache | None) -> Tensor:
    """Mean of the last `window` values including the own; before the start of a text its first value counts."""
    history_BW = value_BC[:, :1].expand(-1, window - 1)
    if cache is not None and cache.recent_BW is not None:
        history_BW = torch.where(context.continues_B[:, None], cache.recent_BW, history_BW)
    windows_BCW = torch.cat((history_BW, value_BC), dim=1).unfold(1, window, 1)
    if context.tokens.segment_BC is not None:
        first_BC = first_columns(changes(context.tokens.segment_BC))      # -1: the history is that of its own text
        column_C = torch.arange(value_BC.shape[1], device=value_BC.device)
        column_CW = column_C[:, None] + torch.arange(1 - window, 1, device=value_BC.device)
        value_of_first_BC = value_BC.gather(1, first_BC.clamp(min=0))
        is_before_BCW = column_CW < first_BC[..., None]
        is_before_BCW = is_before_BCW & (first_BC >= 0)[..., None]
        windows_BCW = torch.where(is_before_BCW, value_of_first_BC[..., None], windows_BCW)
    if cache is not None:
        count_B = torch.tensor(context.tokens.counts, device=value_BC.device)
        row_B = torch.arange(len(count_B), device=value_BC.device)
        last_BW = windows_BCW[row_B, (count_B - 1).clamp(min=0), 1:]
        cache.recent_BW = torch.where(count_B[:, None] > 0, last_BW, history_BW)
    return windows_BCW.mean(-1)


class DecisionLayer(DenseLayer):
    """Dense for every token; scores each for the dynamic layer that follows."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.window = config.routing["ma_window"]
        self.prior = Prior(config)
        self.router = SurpriseRouter(config)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        (post, _), routing = super().forward(stream, context, cache)
        h = stream.hidden_BCD
        prior = wide(h) + wide(self.prior(h))
        static_BC = (wide(post) - wide(h)).square().mean(-1)
        change_BC = (wide(post) - wide(prior)).square().mean(-1)
        average_BC = moving_average(static_BC.detach(), self.window, context, cache)
        return Stream(post, self.router(static_BC, change_BC, average_BC)), routing


class DynamicLayer(RoutedLayer):
    """Only tokens that the decision layer's score selects; the gate is G = 1 - exp(-r)."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.routing = config.routing      # whose `score` changes where an older export is converted

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        score_BT = cast(Tensor, stream.score_BC)
        # Either form is accurate in value and gradient on its side.
        gate_BT = torch.where(score_BT < 1, -torch.expm1(-score_BT), 1 - torch.exp(-score_BT))
        if self.routing["score"] == "gate":
            score_BT = gate_BT
        return self.route(stream.hidden_BCD, score_BT, gate_BT, context, cache)


# ---- MoD -----------------------------------------------------------------------------------------


class MixtureOfDepthsLayer(RoutedLayer):
    """Only tokens that a linear router selects."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.gate = config.routing["gate"]
        self.router = WideLinear(config.hidden_size, 1, bias=False)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        logit_BT = self.router(stream.hidden_BCD).squeeze(-1)
        gate_BT = logit_BT.sigmoid() if self.gate == "sigmoid" else logit_BT
        return self.route(stream.hidden_BCD, logit_BT, gate_BT, context, cache)


# ---- DTRNet --------------------------------------------------------------------------------------


class AttendOrBypass(nn.Module):
    """Logits [B, T, 2] of attending and of bypassing attention."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.fc1 = WideLinear(config.hidden_size, config.hidden_size // 2)
        self.fc2 = WideLinear(config.hidden_size // 2, 2)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(h_BTD)))


class DTRNetLayer(RoutedLayer):
    """Only chosen tokens attend, to each other; the rest take their own values. Feed-forward for every token.

    Tokens are scored by the difference of the two logits: probabilities round to 0 and 1, where tokens tie. Thresholds of
    older exports are probabilities.
    """

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.router = AttendOrBypass(config)
        self.by_logit = config.routing.get("score", "logit") == "logit"

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        logits_BT2 = self.router(stream.hidden_BCD)
        attend_BT, bypass_BT = logits_BT2.softmax(-1).unbind(-1)
        score_BT = logits_BT2[..., 0] - logits_BT2[..., 1] if self.by_logit or context.topk else attend_BT
        routing = Routing(self.choose(score_BT.detach(), stream.hidden_BCD, context), attend_BT.detach())
        gate_BT = torch.where(routing.processed_BC, attend_BT, bypass_BT)
        chosen = pack(routing.processed_BC, segment_BT=context.tokens.segment_BC)
        h_BTD = self.run(self.process_all, stream.hidden_BCD, gate_BT, context.cos_BCK, context.sin_BCK, chosen, cache=cache)
        return Stream(h_BTD), routing

    def process_all(self, h_BTD: Tensor, gate_BT: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, chosen: Packed,
                    cache: LayerCache | None) -> Tensor:
        x_BTD, attention = self.input_layernorm(h_BTD), self.self_attn
        v_BTGK = attention.values(x_BTD)
        mixed_BTHK = v_BTGK.repeat_interleave(attention.num_key_value_groups, dim=2)
        if any(chosen.counts):
            attended_BCHK, _ = attention.mix(take(x_BTD, chosen), take(v_BTGK, chosen), take(cos_BTK, chosen),
                                             take(sin_BTK, chosen), chosen, cache)
            mixed_BTHK = put_back(mixed_BTHK, chosen, attended_BCHK)
        update_BTD = gate_BT.unsqueeze(-1) * attention.o_proj(mixed_BTHK.flatten(2))
        return self.add_mlp(h_BTD + update_BTD.type_as(h_BTD))


# ---- the model -----------------------------------------------------------------------------------

LAYERS = {"dense": DenseLayer, "dtf_decision": DecisionLayer, "dtf_dynamic": DynamicLayer, "mod": MixtureOfDepthsLayer,
          "dtrnet": DTRNetLayer}


@dataclass
class MegadynModelOutput(BaseModelOutputWithPast):
    """`attentions` [B, H, T, L]: with output_attentions, per layer, over all columns seen so far; 0 at padding."""

    routing: tuple[Tensor, ...] | None = None
    """With output_routing: per layer, bool [B, T], the tokens that it processed; of dtrnet, those that attended."""
    gates: tuple[Tensor | None, ...] | None = None
    """With output_routing: per layer, float [B, T], the score that chooses tokens (of dtf r = -log(1 - G); of mod the
    logit; of dtrnet the probability to attend), 0 for padding; None where all are processed."""


@dataclass
class MegadynOutput(CausalLMOutputWithPast):
    routing: tuple[Tensor, ...] | None = None
    """As in MegadynModelOutput."""
    gates: tuple[Tensor | None, ...] | None = None
    """As in MegadynModelOutput."""


LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Of transformers' loss function."""
SILENT_VALUES = {"is_causal": (None, True), "output_router_logits": (None, False), "cache_position": (None,)}
"""Keywords that transformers may pass, and the values that ask for nothing beyond what is done anyway."""


def refuse_unknown(keywords: dict[str, Any], cache: "MegadynCache | None", columns: int) -> None:
    """TypeError for a keyword that would change nothing."""
    for name, value in keywords.items():
        if name not in SILENT_VALUES:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if name == "cache_position" and value is not None:
            past = 0 if cache is None else cache.columns
            if value.tolist() != list(range(past, past + columns)):
                raise ValueError(f"cache_position: must count from {past}, the number of columns in the cache")
        elif not any(value is silent for silent in SILENT_VALUES[name]):
            raise ValueError(f"{name} = {value!r}: this model has only {SILENT_VALUES[name][-1]}")


def unpacked_weights(weight_BHCP: Tensor, tokens: Packed, keys: Packed, columns: int, past_columns: int) -> Tensor:
    """Attention's weights [B, H, T, L] over the columns as given; the very tensor if nothing was packed."""
    rows, heads = weight_BHCP.shape[:2]
    total = past_columns + columns
    if min(tokens.counts) == columns and min(keys.counts) == total:
        return weight_BHCP
    index_BHCP = keys.index_BC[:, None, None, :].expand_as(weight_BHCP)
    weight_BHCL = weight_BHCP.new_zeros(rows, heads, weight_BHCP.shape[2], total).scatter(3, index_BHCP, weight_BHCP)
    weight_BCHL = weight_BHCL.transpose(1, 2)
    return put_back(weight_BCHL.new_zeros(rows, columns, heads, total), tokens, weight_BCHL).transpose(1, 2)


def mask_of_call(attention_mask: Tensor | None, x_BTD: Tensor, cache: MegadynCache | None) -> Tensor:
    """Which columns hold real tokens, [B, L] with those in the cache, or [B, T] if the given mask has only these."""
    rows, columns = x_BTD.shape[:2]
    if attention_mask is None:
        past = 0 if cache is None else cache.columns
        return torch.ones(rows, past + columns, dtype=torch.bool, device=x_BTD.device)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: must be [{rows}, {columns} or more]")
    return attention_mask != 0


def sequences_of_call(cu_seq_lens: tuple[Tensor | None, Tensor | None], max_lengths: tuple[int | None, int | None],
                      seq_idx: Tensor | None, x_BTD: Tensor, cache: MegadynCache | None) -> Tensor | None:
    """Numbers [B, T] that differ from one sequence to the next; None if neither form of them was given.

    Args:
        cu_seq_lens: those of queries and of keys, which must be equal. max_lengths: as well.
    """
    if max_lengths != (None, None) and cu_seq_lens == (None, None):
        raise ValueError("max_length_q and max_length_k need cu_seq_lens_q and cu_seq_lens_k")
    lengths, max_length = both_equal("cu_seq_lens", *cu_seq_lens), both_equal("max_length", *max_lengths)
    if lengths is None and seq_idx is None:
        return None
    if cache is not None and any(cache.seen):
        raise ValueError("cu_seq_lens_q and seq_idx describe whole sequences: give them without past_key_values")
    if lengths is None:
        return cast(Tensor, seq_idx).expand(x_BTD.shape[0], -1)
    ids_BT = sequence_ids(lengths, max_length, *x_BTD.shape[:2])
    if seq_idx is not None and not torch.equal(changes(ids_BT), changes(seq_idx.expand_as(ids_BT))):
        raise ValueError("seq_idx and cu_seq_lens_q: must describe the same sequences")
    return ids_BT


def both_equal(name: str, of_queries: Any, of_keys: Any) -> Any:
    """The one value of both, or that of the two which was given; ValueError if they differ."""
    if of_queries is None or of_keys is None:
        return of_keys if of_queries is None else of_queries
    if not torch.equal(torch.as_tensor(of_queries), torch.as_tensor(of_keys)):
        raise ValueError(f"{name}_k differs from {name}_q: tokens attend to their own sequence only, so both must be equal")
    return of_queries


def texts_after(before: Texts, tokens: Packed, position_BC: Tensor, ended_BC: Tensor) -> Texts:
    """Where each row stands after a call: at its last token, or as `before` if it has none."""
    count_B = torch.tensor(tokens.counts, device=position_BC.device)
    row_B, last_B = torch.arange(len(count_B), device=count_B.device), (count_B - 1).clamp(min=0)

    def at_last(x_BC: Tensor, before_B: Tensor | None) -> Tensor:
        last = x_BC[row_B, last_B]
        return torch.where(count_B > 0, last, torch.zeros_like(last) if before_B is None else before_B)

    segment_B = None if tokens.segment_BC is None else at_last(tokens.segment_BC, before.segment_B)
    return Texts(at_last(position_BC + 1, before.position_B), at_last(ended_BC, before.ended_B), segment_B)


class MegadynPreTrainedModel(PreTrainedModel):
    config_class = MegadynConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in LAYERS.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True      # the cache cannot be rolled back, so assisted generation is refused

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        convert_older(loaded[0] if isinstance(loaded, tuple) else loaded)      # a tuple with output_loading_info=True
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SurpriseRouter | ThresholdRule):
            module.reset_parameters()
        if isinstance(module, FixedLinear):
            module.reset_parameters(self.config.initializer_range)


class MegadynModel(MegadynPreTrainedModel):
    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config)
        check_rotary(config.rope_parameters)      # it may have been changed since the configuration was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LAYERS[kind](config, i) for i, kind in enumerate(config.routed_layer_types, 1))
        self.norm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_load_state_dict_pre_hook(convert_older_state)
        routers = {part for name in self.state_dict() for part in name.split(".")} & {"router", "causal_router"}
        self._keep_in_fp32_modules_strict = sorted(routers)
        self._keep_in_fp32_modules = [".*router"] if routers else []      # for quantizers, which leave these as they are
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegadynCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_routing: bool = False,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> MegadynModelOutput:
        """`attention_mask` [B, past + T] or [B, T] is 0 at padding, on whichever side; `position_ids` count real tokens.

        Sequences of a padding-free batch, each computed as if alone: `position_ids` that start again; `cu_seq_lens_q` and
        `max_length_q` (those of k must be equal) as FlashAttention takes them; `seq_idx` [B, T], a number per sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self.cache_of_call(past_key_values, use_cache, rows=x_BTD.shape[0])
        refuse_unknown(kwargs, cache, x_BTD.shape[1])
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            self.check_attentions()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        given = sequences_of_call((cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), seq_idx, x_BTD, cache)
        mask_BL = mask_of_call(attention_mask, x_BTD, cache)
        tokens = pack(mask_BL[:, -x_BTD.shape[1]:], least=1)
        context, texts = self.context_of_call(x_BTD, tokens, input_ids, position_ids, given, cache, bool(output_attentions))
        tokens = context.tokens

        def unpacked(x_BC: Tensor) -> Tensor:
            return put_back(x_BC.new_zeros(*x_BTD.shape[:2], *x_BC.shape[2:]), tokens, x_BC)

        stream, hidden_states, routings = Stream(take(x_BTD, tokens)), [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(unpacked(stream.hidden_BCD))
                stream = stream._replace(hidden_BCD=take(hidden_states[-1], tokens))      # gradients reach what is returned
            stream, routing = layer(stream, context, None if cache is None else cache.layers[i])
            routings.append(routing)
        last_hidden_state = unpacked(self.norm(stream.hidden_BCD))
        attentions = self.attentions_of_call(routings, tokens, mask_BL, x_BTD, cache) if output_attentions else None
        if cache is not None:
            cache.advance(x_BTD.shape[1], tokens.counts, texts)
        return MegadynModelOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=cache,
            hidden_states=(*hidden_states, last_hidden_state) if output_hidden_states else None,
            attentions=attentions,
            routing=tuple(unpacked(r.processed_BC) for r in routings) if output_routing else None,
            gates=tuple(None if r.gate_BC is None else unpacked(r.gate_BC) for r in routings) if output_routing else None,
        )

    @property
    def topk(self) -> bool:
        """Whether layers choose by top-k; read at each call, because the mode may be changed on a loaded model."""
        one_of("config.routing_mode", self.config.routing_mode, ROUTING_MODES)
        return self.config.routing_mode == "topk" and has_topk(self.config.routing)

    def check_attentions(self) -> None:
        """ValueError if layers cannot return attention weights."""
        if self.config.routing["kind"] != "dense":
            raise ValueError("output_attentions is not supported: routed layers attend among different tokens")
        if self.config._attn_implementation != "eager":
            raise ValueError(f"output_attentions needs attn_implementation = 'eager': "
                             f"{self.config._attn_implementation!r} returns no weights")

    def attentions_of_call(self, routings: list[Routing], tokens: Packed, mask_BL: Tensor, x_BTD: Tensor,
                           cache: MegadynCache | None) -> tuple[Tensor, ...]:
        """Each layer's attention weights over columns as given; `mask_BL` as in `mask_of_call`."""
        columns, past = x_BTD.shape[1], 0 if cache is None else cache.columns
        if mask_BL.shape[1] != past + columns:
            raise ValueError(f"attention_mask has {mask_BL.shape[1]} columns: with output_attentions must have {past + columns}, "
                             "those in the cache among them")
        keys = pack(mask_BL, least=1)
        return tuple(unpacked_weights(cast(Tensor, r.weight_BHCP), tokens, keys, columns, past) for r in routings)

    def cache_of_call(self, given: Cache | None, use_cache: bool | None, rows: int) -> MegadynCache | None:
        """The given cache, a new one, or none; top-k routing cannot have one, because it looks at the whole sequence."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not self.topk
        if given is None and not use_cache:
            return None
        if self.topk:
            raise ValueError("routing_mode = 'topk' looks at the whole sequence, so it cannot decode with a cache: "
                             "pass use_cache=False, or set config.routing_mode = 'causal'")
        cache = MegadynCache(len(self.layers)) if given is None else given
        if not isinstance(cache, MegadynCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}, which cannot hold other tokens in each layer: "
                             "leave it out, and the model makes a MegadynCache")
        cache.seen = cache.seen or [0] * rows
        if len(cache.seen) != rows:
            raise ValueError(f"past_key_values holds {len(cache.seen)} sequences, but the input has {rows}")
        return cache

    def borders_of_call(self, tokens: Packed, input_ids: Tensor | None, position_ids: Tensor | None,
                        sequence_BT: Tensor | None, before: Texts, goes_on_B: Tensor) -> Borders:
        """Arguments as in `context_of_call`; `goes_on_B`: rows with tokens in the cache."""
        sequence_BC, ended_BC = torch.zeros_like(tokens.valid_BC), torch.zeros_like(tokens.valid_BC)
        if position_ids is not None:
            sequence_BC |= restarts(take(position_ids, tokens), tokens.index_BC, goes_on_B)
        if sequence_BT is not None:
            sequence_BC |= changes(take(sequence_BT, tokens))
        text_BC = sequence_BC
        if self.config.document_mask:
            if input_ids is None:
                raise ValueError("config.document_mask = True: give input_ids, because inputs_embeds do not show where a "
                                 "document ends")
            ended_BC = take(input_ids, tokens) == self.config.eod_token_id
            ended_before_B = before.ended_B & goes_on_B
            text_BC = sequence_BC | torch.cat((ended_before_B[:, None], ended_BC[:, :-1]), dim=1)
        return Borders(sequence_BC & tokens.valid_BC, text_BC & tokens.valid_BC, ended_BC)

    def context_of_call(self, x_BTD: Tensor, tokens: Packed, input_ids: Tensor | None, position_ids: Tensor | None,
                        sequence_BT: Tensor | None, cache: MegadynCache | None, attentions: bool) -> tuple[Context, Texts]:
        """What the layers share, and where each row stands after this call; `sequence_BT` as in `sequences_of_call`."""
        rows, device = x_BTD.shape[0], x_BTD.device
        before = Texts.at_start(rows, device) if cache is None or cache.texts is None else cache.texts
        goes_on_B = torch.tensor([0] * rows if cache is None else cache.seen, device=device) > 0
        if position_ids is not None:
            position_ids = position_ids.expand(rows, -1)
        borders = self.borders_of_call(tokens, input_ids, position_ids, sequence_BT, before, goes_on_B)
        if position_ids is not None:
            position_BC = take(position_ids, tokens)
        else:
            first_BC = first_columns(borders.text_BC)
            column_C = torch.arange(first_BC.shape[1], device=device)
            position_BC = torch.where(first_BC < 0, before.position_B[:, None] + column_C, column_C - first_BC)
        sequence_BC = None
        if before.segment_B is not None or borders.text_BC.any():
            segment_BC = borders.text_BC.cumsum(1)
            if before.segment_B is not None:
                segment_BC = segment_BC + before.segment_B[:, None]
            tokens = tokens._replace(segment_BC=segment_BC)
            sequence_BC = borders.sequence_BC.cumsum(1)
        theta = cast(dict, self.config.rope_parameters)["rope_theta"]
        cos_BCK, sin_BCK = rotary_table(position_BC, cast(int, self.config.head_dim), theta, x_BTD.dtype)
        context = Context(tokens, cos_BCK, sin_BCK, goes_on_B & ~borders.text_BC[:, 0], self.topk, sequence_BC, attentions)
        return context, texts_after(before, tokens, position_BC, borders.ended_BC)


class MegadynForCausalLM(MegadynPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config)
        self.model = MegadynModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegadynCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> MegadynOutput:
        """`labels` [B, T] are the input ids (-100: not counted); they are shifted here, as in all of transformers, unless
        `shift_labels` has them shifted. Other arguments as in `MegadynModel.forward`."""
        of_loss = {name: kwargs.pop(name) for name in LOSS_KEYWORDS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, output_routing=output_routing, cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q, max_length_k=max_length_k, seq_idx=seq_idx,
            return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return MegadynOutput(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                             hidden_states=outputs.hidden_states, attentions=outputs.attentions,
                             routing=outputs.routing, gates=outputs.gates)

    def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """transformers' hook: without it `generate` would build a DynamicCache, which holds every token in every layer."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation = {generation_config.cache_implementation!r}: a routed model has its own")
        model_kwargs["past_key_values"] = MegadynCache(self.config.num_hidden_layers)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' hook for all of it."""
        raise ValueError("continuous batching (generate_batch) is not supported: its paged cache holds every token in every "
                         "layer, but routed layers hold only those that they process; use generate with a padded batch")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self.init_continuous_batching()


MegadynModel.register_for_auto_class("AutoModel")
MegadynForCausalLM.register_for_auto_class("AutoModelForCausalLM")
