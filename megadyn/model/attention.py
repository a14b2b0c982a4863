"""Grouped-query causal self-attention."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.config import ModelConfig
from megadyn.errors import ConfigError
from megadyn.model.documents import attention_mask, segment_ends
from megadyn.model.norm import HeadNorm
from megadyn.model.rope import Rotary
from megadyn.parallel.linear import ColumnParallelLinear, KeyValueLinear, RowParallelLinear
from megadyn.parallel.mappings import copy_to_tp
from megadyn.parallel.params import ParamMaker, normal


def attention_backend(asked: str, precision: str) -> tuple[str, str]:
    """The backend to use and why. Raises ConfigError when `flash` is asked for and cannot run here."""
    why_not = (
        "no CUDA device" if not torch.cuda.is_available()
        else "flash-attn is not installed (pip install megadyn[flash])" if importlib.util.find_spec("flash_attn") is None
        else "flash-attn has no fp32 kernels" if precision == "fp32"
        else None
    )
    if asked == "flash" and why_not:
        raise ConfigError("model.attention", asked, f"sdpa on this machine: {why_not}")
    if asked == "auto":
        return ("sdpa", f"auto: {why_not}") if why_not else ("flash", "auto: flash-attn is installed")
    return asked, "as configured"


def causal_attention(q: Tensor, k: Tensor, v: Tensor, backend: str, documents: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, each token seeing itself and what stands before it.

    Args:
        q: [B, S, H, K]. k, v: [B, S, G, K] with G a divisor of H (grouped-query attention).
        documents: ids [B, S]; a token then sees only its own document.

    Returns:
        [B, S, H, K].
    """
    if backend == "flash":
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        if documents is None:
            return flash_attn_func(q, k, v, causal=True)
        ends, longest = segment_ends(documents), q.shape[1]
        flat = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, longest, longest, causal=True)
        return flat.view_as(q)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if documents is None else attention_mask(documents)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=q.shape[1] != k.shape[1])
    return attended.transpose(1, 2)


class Attention(nn.Module):
    """Attn(x) of a layer, x already normed; heads are cut over tensor ranks."""

    def __init__(self, name: str, model: ModelConfig, *, backend: str, make: ParamMaker, output_std: float):
        super().__init__()
        assert model.head_dim is not None and model.num_kv_heads is not None
        d, self.head_dim, self.backend, self.tp = model.hidden_size, model.head_dim, backend, make.tp
        init = normal(model.init_std)
        self.q_proj = ColumnParallelLinear(f"{name}.q_proj", d, model.num_heads * self.head_dim,
                                           make=make, init=init, bias=model.qkv_bias)
        self.k_proj = KeyValueLinear(f"{name}.k_proj", d, model.num_kv_heads, self.head_dim,
                                     make=make, init=init, bias=model.qkv_bias)
        self.v_proj = KeyValueLinear(f"{name}.v_proj", d, model.num_kv_heads, self.head_dim,
                                     make=make, init=init, bias=model.qkv_bias)
        self.o_proj = RowParallelLinear(f"{name}.o_proj", model.num_heads * self.head_dim, d,
                                        make=make, init=normal(output_std))
        self.rotary = Rotary(self.head_dim, model.rope_theta)
        hybrid = model.normalization == "hybridnorm"
        self.q_norm, self.k_norm, self.v_norm = (
            HeadNorm(f"{name}.{kind}_norm", self.head_dim, model.norm_eps, make=make) if hybrid else None for kind in "qkv")

    def queries_keys(self, x: Tensor, positions: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """q [B, S, H/tp, K] and k [B, S, G/tp, K], turned to their positions; x has passed `copy_to_tp`."""
        q, k = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.rotary(q, k, positions, length)

    def values(self, x: Tensor) -> Tensor:
        """v [B, S, G/tp, K]; x has passed `copy_to_tp`."""
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return v if self.v_norm is None else self.v_norm(v)

    def forward(self, x: Tensor, positions: Tensor | None, length: int, documents: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D].

        Args:
            positions: [B, S], below `length`; None for 0 .. S-1. documents: ids [B, S], see `causal_attention`.
        """
        x = copy_to_tp(x, self.tp)
        q, k = self.queries_keys(x, positions, length)
        return self.o_proj(causal_attention(q, k, self.values(x), self.backend, documents).flatten(-2))
