"""The layers that exported models share: packed tokens, the cache, the dense transformer layer, and choosing tokens.

Stand-alone: shipped beside the weights, imports nothing of megadyn. `modeling_megadyn.py` explains the packing; the layers of
the export's own kind of routing stand in `routing_<kind>.py`.
"""

# Dims: B rows, T columns as given, C packed columns, D hidden, H query heads, G key/value heads, K head size,
#       P packed tokens in a layer's cache, W moving-average window.

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_megadyn import MegadynConfig

# ---- packing -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Some tokens of each row, pushed to the left in their order. Columns beyond a row's count hold other tokens."""

    index_BC: Tensor      # the column each came from; distinct in a row
    valid_BC: Tensor      # False beyond the row's count
    counts: list[int]     # per row


def pack(mask_BT: Tensor, least: int = 0) -> Packed:
    """The tokens where the mask is True, in as many columns as the longest row needs, and at least `least`."""
    counts = mask_BT.sum(1).tolist()
    width = max(least, *counts)
    index_BT = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    valid_BT = torch.arange(width, device=mask_BT.device) < torch.tensor(counts, device=mask_BT.device)[:, None]
    return Packed(index_BT[:, :width], valid_BT, counts)


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


def best_of_each_row(score_BC: Tensor, tokens: Packed, capacity: float) -> Tensor:
    """Mask [B, C] of exactly k = max(1, floor(capacity * tokens of the row)) best scores; ties go to the earlier token."""
    wanted = [max(1, math.floor(capacity * count)) for count in tokens.counts]
    best_first_BC = score_BC.masked_fill(~tokens.valid_BC, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank_C = torch.arange(score_BC.shape[1], device=score_BC.device)
    chosen_BC = rank_C < torch.tensor(wanted, device=score_BC.device)[:, None]
    return torch.zeros_like(tokens.valid_BC).scatter(1, best_first_BC, chosen_BC) & tokens.valid_BC


# ---- cache ---------------------------------------------------------------------------------------


class LayerCache:
    """Keys and values of the tokens that one layer processed, packed; DTF decisions keep their last surprises too."""

    def __init__(self) -> None:
        self.key_BPGK: Tensor | None = None
        self.value_BPGK: Tensor | None = None
        self.recent_BW: Tensor | None = None      # the W - 1 latest static surprises
        self.again: LayerCache | None = None      # of the second time, where a layer processes tokens twice
        self.counts: list[int] = []               # tokens held, per row

    def append(self, key_BCGK: Tensor, value_BCGK: Tensor, new: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the new tokens; returns the keys, values and mask [B, C, P] that they attend with (None: plain causal)."""
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
        if is_first:
            return key_BCGK, value_BCGK, None
        last_BC = before_B[:, None] + torch.arange(key_BCGK.shape[1], device=key_BCGK.device)
        mask_BCP = torch.arange(self.key_BPGK.shape[1], device=key_BCGK.device) <= last_BC[..., None]
        return self.key_BPGK, self.value_BPGK, mask_BCP

    def second(self) -> "LayerCache":
        """Keys and values of the tokens that the layer processed once more."""
        self.again = self.again or LayerCache()
        return self.again

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        """A copy of `old` with room for the longest row."""
        grown = like.new_zeros(like.shape[0], max(self.counts), *like.shape[2:])
        if old is not None:
            grown[:, :old.shape[1]] = old
        return grown

    def select_rows(self, rows: list[int]) -> None:
        if self.again is not None:
            self.again.select_rows(rows)
        if self.recent_BW is not None:
            self.recent_BW = self.recent_BW[rows]
        if self.key_BPGK is not None and self.value_BPGK is not None:
            self.counts = [self.counts[row] for row in rows]
            longest = max(self.counts)      # the row that was longest may be gone
            self.key_BPGK, self.value_BPGK = self.key_BPGK[rows, :longest], self.value_BPGK[rows, :longest]


class MegadynCache(Cache):
    """A LayerCache per layer, in the form that `generate` uses. Its length counts columns, padding included."""

    layers: list[LayerCache]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerCache() for _ in range(num_layers)])
        self.columns = 0
        self.seen: list[int] = []      # real tokens so far, per row

    def advance(self, columns: int, counts: list[int]) -> None:
        """Called once all layers have taken up a call's tokens."""
        self.columns += columns
        self.seen = [old + count for old, count in zip(self.seen, counts, strict=True)]

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
        self.columns, self.seen = 0, []

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.tolist()
        self.seen = [self.seen[row] for row in rows]
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
    gate_BC: Tensor | None = None      # DTF: a decision layer's score for its dynamic layer


class Routing(NamedTuple):
    """What a layer did, for reports."""

    processed_BC: Tensor
    gate_BC: Tensor | None = None


class Context(NamedTuple):
    """What all layers of one call share."""

    tokens: Packed           # the real tokens of each row
    cos_BCK: Tensor
    sin_BCK: Tensor
    started_B: Tensor        # rows with tokens in earlier calls
    topk: bool


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


def attend(q_BCHK: Tensor, k_BPGK: Tensor, v_BPGK: Tensor, mask_BCP: Tensor | None, implementation: str) -> Tensor:
    """Grouped-query attention [B, C, H, K]; without a mask it is causal, and P = C."""
    q, k, v = (x.transpose(1, 2) for x in (q_BCHK, k_BPGK, v_BPGK))
    mask = None if mask_BCP is None else mask_BCP.unsqueeze(1)
    if implementation == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    score = wide(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return (score.softmax(dim=-1).to(q.dtype) @ v).transpose(1, 2)


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
        self.heads_per_value = q_size // kv_size
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        hybrid = config.normalization == "hybridnorm"
        self.q_norm, self.k_norm, self.v_norm = (
            MegadynRMSNorm(self.head_size, config.rms_norm_eps) if hybrid else nn.Identity() for _ in range(3))

    def values(self, x_BCD: Tensor) -> Tensor:
        """V(x) [B, C, G, K]."""
        return self.v_norm(self.v_proj(x_BCD).unflatten(-1, (-1, self.head_size)))

    def mix(self, x_BCD: Tensor, v_BCGK: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed,
            cache: LayerCache | None) -> Tensor:
        """Each head's average of values [B, C, H, K], the output projection's input."""
        heads = (-1, self.head_size)
        q_BCHK = rotate(self.q_norm(self.q_proj(x_BCD).unflatten(-1, heads)), cos_BCK, sin_BCK)
        k_BPGK = rotate(self.k_norm(self.k_proj(x_BCD).unflatten(-1, heads)), cos_BCK, sin_BCK)
        v_BPGK, mask_BCP = v_BCGK, None
        if cache is not None:
            k_BPGK, v_BPGK, mask_BCP = cache.append(k_BPGK, v_BPGK, tokens)
        return attend(q_BCHK, k_BPGK, v_BPGK, mask_BCP, self.config._attn_implementation)

    def forward(self, x_BCD: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed, cache: LayerCache | None) -> Tensor:
        return self.o_proj(self.mix(x_BCD, self.values(x_BCD), cos_BCK, sin_BCK, tokens, cache).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner_size, bias=False)
        self.up_proj = nn.Linear(size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DenseLayer(nn.Module):
    """Every token goes through attention and feed-forward."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]      # both are set by PreTrainedModel

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

    def process(self, h_BCD: Tensor, cos_BCK: Tensor, sin_BCK: Tensor, tokens: Packed, cache: LayerCache | None) -> Tensor:
        """h + Block(h)."""
        return self.add_mlp(h_BCD + self.self_attn(self.input_layernorm(h_BCD), cos_BCK, sin_BCK, tokens, cache))

    def add_mlp(self, u_BCD: Tensor) -> Tensor:
        x_BCD = self.post_attention_layernorm(u_BCD)
        return (x_BCD if self.is_hybrid else u_BCD) + self.mlp(x_BCD)

    def run(self, process: Callable[..., Tensor], *inputs: Any, cache: LayerCache | None) -> Tensor:
        """`process`, recomputed in the backward pass if asked for. Tokens are chosen outside: they are never chosen again."""
        if self.gradient_checkpointing and self.training and cache is None:
            return self._gradient_checkpointing_func(process, *inputs, None)
        return process(*inputs, cache)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        h_BCD = self.run(self.process, stream.hidden_BCD, context.cos_BCK, context.sin_BCK, context.tokens, cache=cache)
        return Stream(h_BCD), Routing(context.tokens.valid_BC)


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
        self.register_buffer("weight", torch.empty(out_size, size, dtype=torch.float32))

    def reset(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight)


class ThresholdRule(Float32Module):
    """Causal stand-in for top-k: a token is routed if its score reaches the threshold."""

    threshold: Tensor

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.empty(1, dtype=torch.float32))

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
    """A token is routed if its score exceeds a constant: MoD's logit trained by cross-entropy, DTRNet's token choice."""

    LIMITS = {"bce": 0.0, "token_choice": 0.5}

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.limit = self.LIMITS[config.routing["causal"]]

    def forward(self, score_BT: Tensor, h_BTD: Tensor) -> Tensor:
        return score_BT > self.limit


CAUSAL_RULES = {"threshold": ThresholdRule, "predictor": PredictorRule, "bce": ConstantRule, "token_choice": ConstantRule}


class RoutedLayer(DenseLayer):
    """Only chosen tokens are processed, and attend to each other; the rest pass."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.capacity = config.routing.get("capacity")
        self.causal_router = CAUSAL_RULES[config.routing["causal"]](config)

    def choose(self, score_BT: Tensor, h_BTD: Tensor, context: Context) -> Tensor:
        if context.topk:
            return best_of_each_row(score_BT, context.tokens, cast(float, self.capacity))
        return self.causal_router(score_BT, h_BTD) & context.tokens.valid_BC

    def route(self, h_BTD: Tensor, score_BT: Tensor, gate_BT: Tensor, context: Context,
              cache: LayerCache | None) -> tuple[Stream, Routing]:
        """h + gate * Block(h) for the tokens that the score selects, h for the rest."""
        routing = Routing(self.choose(score_BT.detach(), h_BTD, context), score_BT.detach())
        chosen = pack(routing.processed_BC)
        if not any(chosen.counts):
            return Stream(h_BTD), routing
        h_BCD, cos_BCK, sin_BCK = (take(x, chosen) for x in (h_BTD, context.cos_BCK, context.sin_BCK))
        block_BCD = self.run(self.process, h_BCD, cos_BCK, sin_BCK, chosen, cache=cache) - h_BCD
        h_BCD = h_BCD + take(gate_BT, chosen).unsqueeze(-1) * block_BCD
        return Stream(put_back(h_BTD, chosen, h_BCD.type_as(h_BTD))), routing
