"""The exported model: a Qwen2-style transformer whose routed layers process only some of the tokens.

Stand-alone: shipped beside the weights with `configuration_megadyn.py`, imports nothing of megadyn. The mathematics
is megadyn's design/routing.md; sources: the DTF thesis ("Dynamic Transformers", eqs. 3.1-3.13), Mixture-of-Depths
(arXiv 2404.02258), DTRNet (2509.00925), LayerNorm Scaling (2502.05795), HybridNorm (2503.04598), Qwen2.

One idea carries the file: tokens are PACKED. At the entrance each row's real tokens are pushed to the left, which
removes the padding; at each routed layer the chosen ones are pushed to the left again. In a packed row plain causal
attention is right whatever was left out, each token keeps its original position for RoPE, and a layer's cache holds
the packed tokens of each row: those that the layer processed, and nothing for the others.

A new kind of layer is a subclass of DenseLayer or RoutedLayer in LAYERS, a new causal rule a class in CAUSAL_RULES;
their keys go in the configuration's tables.
"""

# Dims: B rows, T columns as given, C packed columns, D hidden, H query heads, G key/value heads, K head size,
#       P packed tokens in a layer's cache, W moving-average window.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_megadyn import ROUTING_MODES, MegadynConfig, has_topk, one_of

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
    score_BC: Tensor | None = None      # DTF: a decision layer's r = -log(1 - G) for its dynamic layer


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
        self.register_buffer("weight", torch.empty(out_size, size, dtype=torch.float32))

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight)


class ThresholdRule(Float32Module):
    """Causal stand-in for top-k: a token is routed if its score reaches the threshold."""

    threshold: Tensor

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.empty(1, dtype=torch.float32))

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
    """Mean of the last `window` values including the own; before a row's start its first value counts."""
    history_BW = value_BC[:, :1].expand(-1, window - 1)
    if cache is not None and cache.recent_BW is not None:
        history_BW = torch.where(context.started_B[:, None], cache.recent_BW, history_BW)
    values = torch.cat((history_BW, value_BC), dim=1)
    if cache is not None:
        count_B = torch.tensor(context.tokens.counts, device=values.device)
        cache.recent_BW = values.gather(1, count_B[:, None] + torch.arange(window - 1, device=values.device))
    return values.unfold(1, window, 1).mean(-1)


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
        chosen = pack(routing.processed_BC)
        h_BTD = self.run(self.process_all, stream.hidden_BCD, gate_BT, context.cos_BCK, context.sin_BCK, chosen, cache=cache)
        return Stream(h_BTD), routing

    def process_all(self, h_BTD: Tensor, gate_BT: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, chosen: Packed,
                    cache: LayerCache | None) -> Tensor:
        x_BTD, attention = self.input_layernorm(h_BTD), self.self_attn
        v_BTGK = attention.values(x_BTD)
        mixed_BTHK = v_BTGK.repeat_interleave(attention.heads_per_value, dim=2)
        if any(chosen.counts):
            attended_BCHK = attention.mix(take(x_BTD, chosen), take(v_BTGK, chosen), take(cos_BTK, chosen),
                                          take(sin_BTK, chosen), chosen, cache)
            mixed_BTHK = put_back(mixed_BTHK, chosen, attended_BCHK)
        update_BTD = gate_BT.unsqueeze(-1) * attention.o_proj(mixed_BTHK.flatten(2))
        return self.add_mlp(h_BTD + update_BTD.type_as(h_BTD))


# ---- the model -----------------------------------------------------------------------------------

LAYERS = {"dense": DenseLayer, "dtf_decision": DecisionLayer, "dtf_dynamic": DynamicLayer, "mod": MixtureOfDepthsLayer,
          "dtrnet": DTRNetLayer}


@dataclass
class MegadynModelOutput(BaseModelOutputWithPast):
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


class MegadynPreTrainedModel(PreTrainedModel):
    config_class = MegadynConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in LAYERS.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["router", "causal_router"]
    _keep_in_fp32_modules = [".*router"]      # quantizers read this one, as patterns: they leave routers as they are
    _supports_sdpa = True
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
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LAYERS[kind](config, i) for i, kind in enumerate(config.layer_types, 1))
        self.norm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_load_state_dict_pre_hook(convert_older_state)
        self.post_init()

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
    ) -> MegadynModelOutput:
        """`attention_mask` [B, past + T] or [B, T] is 0 at padding, on whichever side; `position_ids` count real tokens."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions is not supported: routed layers attend among different tokens")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self.cache_of_call(past_key_values, use_cache, rows=x_BTD.shape[0])
        context = self.context_of_call(x_BTD, attention_mask, position_ids, cache)
        tokens = context.tokens

        def unpacked(x_BC: Tensor) -> Tensor:
            return put_back(x_BC.new_zeros(*x_BTD.shape[:2], *x_BC.shape[2:]), tokens, x_BC)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        stream, hidden_states, routings = Stream(take(x_BTD, tokens)), [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(unpacked(stream.hidden_BCD))
            stream, routing = layer(stream, context, None if cache is None else cache.layers[i])
            routings.append(routing)
        last_hidden_state = unpacked(self.norm(stream.hidden_BCD))
        if cache is not None:
            cache.advance(x_BTD.shape[1], tokens.counts)
        return MegadynModelOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=cache,
            hidden_states=(*hidden_states, last_hidden_state) if output_hidden_states else None,
            routing=tuple(unpacked(r.processed_BC) for r in routings) if output_routing else None,
            gates=tuple(None if r.gate_BC is None else unpacked(r.gate_BC) for r in routings) if output_routing else None,
        )

    @property
    def topk(self) -> bool:
        """Whether layers choose by top-k; read at each call, because the mode may be changed on a loaded model."""
        one_of("config.routing_mode", self.config.routing_mode, ROUTING_MODES)
        return self.config.routing_mode == "topk" and has_topk(self.config.routing)

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
            raise ValueError(f"past_key_values is a {type(cache).__name__}: must be a MegadynCache")
        cache.seen = cache.seen or [0] * rows
        if len(cache.seen) != rows:
            raise ValueError(f"past_key_values holds {len(cache.seen)} sequences, but the input has {rows}")
        return cache

    def context_of_call(self, x_BTD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None,
                        cache: MegadynCache | None) -> Context:
        rows, columns = x_BTD.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(rows, columns, device=x_BTD.device)
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: must be [{rows}, {columns} or more]")
        real_BT = attention_mask[:, -columns:] != 0
        seen_B = torch.tensor([0] * rows if cache is None else cache.seen, device=x_BTD.device)
        if position_ids is None:
            position_ids = seen_B[:, None] + (real_BT.cumsum(1) - 1).clamp(min=0)
        tokens = pack(real_BT, least=1)
        position_BC = take(position_ids.expand(rows, -1), tokens)
        theta = cast(dict, self.config.rope_parameters)["rope_theta"]
        cos_BCK, sin_BCK = rotary_table(position_BC, cast(int, self.config.head_dim), theta, x_BTD.dtype)
        return Context(tokens, cos_BCK, sin_BCK, seen_B > 0, self.topk)


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
        **kwargs: Any,
    ) -> MegadynOutput:
        """`labels` [B, T] are the input ids (-100: not counted); they are shifted here, as in all of transformers."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, output_routing=output_routing)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MegadynOutput(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                             hidden_states=outputs.hidden_states, routing=outputs.routing, gates=outputs.gates)

    def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """transformers' hook: without it `generate` would build a DynamicCache, which holds every token in every layer."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation = {generation_config.cache_implementation!r}: a routed model has its own")
        model_kwargs["past_key_values"] = MegadynCache(self.config.num_hidden_layers)


MegadynModel.register_for_auto_class("AutoModel")
MegadynForCausalLM.register_for_auto_class("AutoModelForCausalLM")
