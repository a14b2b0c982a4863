"""The layers that exported models share: the dense transformer layer, and choosing tokens.

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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_megadyn import LayerCache
from .configuration_megadyn import MegadynConfig
from .packing_megadyn import Packed, best_of_each_row, mask_inside, pack, put_back, take
from .rope_megadyn import rotate

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
    query [B, H, C, K], key and value [B, G, P, K], mask [B, 1, C, P] of bool; without one causal, the last query seeing all."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if attention_mask is None:
        columns, keys = query.shape[2], key.shape[2]
        attention_mask = torch.ones(columns, keys, dtype=torch.bool, device=query.device).tril(keys - columns)
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
    def __init__(self, config: MegadynConfig, number: int) -> None:
        """`number` of the layer in the model, from 1."""
        super().__init__()
        self.config = config
        self.head_size = cast(int, config.head_dim)
        self.turns = config.no_rope_layers is None or bool(config.no_rope_layers[number - 1])
        slides = config.sliding_layers is None or bool(config.sliding_layers[number - 1])
        self.window = config.sliding_window if slides else None
        q_size = config.num_attention_heads * self.head_size
        kv_size = cast(int, config.num_key_value_heads) * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.num_key_value_groups = q_size // kv_size
        # read by transformers' attention functions
        self.scaling, self.is_causal = self.head_size**-0.5, True
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_output_bias)
        normed = {"hybridnorm": "qkv"}.get(config.normalization, "qk" if config.qk_norm else "")
        self.q_norm, self.k_norm, self.v_norm = (
            MegadynRMSNorm(self.head_size, config.rms_norm_eps) if kind in normed else nn.Identity()
            for kind in "qkv"
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
        q_BCHK = self.q_norm(self.q_proj(x_BCD).unflatten(-1, heads))
        k_BCGK = self.k_norm(self.k_proj(x_BCD).unflatten(-1, heads))
        if self.turns:
            q_BCHK, k_BCGK = (rotate(x, cos_BCK, sin_BCK) for x in (q_BCHK, k_BCGK))
        q_BHCK, k_BGPK, v_BGPK = (x.transpose(1, 2) for x in (q_BCHK, k_BCGK, v_BCGK))
        if cache is None:
            mask_BCP = mask_inside(tokens, self.window)
        else:
            k_BGPK, v_BGPK, mask_BCP = cache.append(k_BGPK, v_BGPK, tokens, self.window)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attention(
            self,
            q_BHCK,
            k_BGPK,
            v_BGPK,
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
        self.self_attn = Attention(config, number)
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
        chosen = pack(routing.processed_BC, context.tokens)
        if chosen.is_empty:
            return Stream(h_BTD), routing
        h_BCD, cos_BCK, sin_BCK = (take(x, chosen) for x in (h_BTD, context.cos_BCK, context.sin_BCK))
        processed_BCD, _ = self.run(self.process, h_BCD, cos_BCK, sin_BCK, chosen, cache=cache)
        h_BCD = h_BCD + take(gate_BT, chosen).unsqueeze(-1) * (processed_BCD - h_BCD)
        return Stream(put_back(h_BTD, chosen, h_BCD.type_as(h_BTD))), routing
