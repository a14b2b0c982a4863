"""Grouped-query causal self-attention."""

import importlib.util
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadyn.config import ATTENTION, ModelConfig, attention_parts
from megadyn.errors import ConfigError
from megadyn.kernels.rule import gpu_lacks, own_device, problem_of
from megadyn.model.documents import Segments, segments_of
from megadyn.model.norm import HeadNorm
from megadyn.model.recompute import recomputed
from megadyn.model.rope import Rotary
from megadyn.model.window import attention_in_one_call, attention_in_window
from megadyn.parallel.linear import ColumnParallelLinear, KeyValueLinear, RowParallelLinear
from megadyn.parallel.mappings import enter_tp
from megadyn.parallel.params import ParamMaker, normal

WITH_WINDOW = ("flash", "flash3")
"""What takes a sliding window over whole rows; others take each row as a segment then."""
PACKAGES = {"flash": ("flash_attn", "flash-attn"), "flash3": ("flash_attn_interface", "flash-attn 3")}
"""Module and name of the packages."""
_BACKENDS = {parts: name for name, parts in ATTENTION.items()}


def backend_name(rows: str, segments: str) -> str:
    """The backend that computes whole rows and segments so."""
    return _BACKENDS[rows, segments]


def no_kernels_for(model: ModelConfig, precision: str) -> str | None:
    """Why this model runs no kernel but torch's own SDPA on this machine, whatever is installed; None if it may."""
    head_dim = model.head_dim
    assert head_dim is not None
    if (problem := gpu_lacks("flash kernels")) is not None:
        return problem
    if precision == "fp32":
        return "no flash kernels for fp32"
    if head_dim % 8 or head_dim > 256:
        return f"no flash kernels for model.head_dim = {head_dim}, not a multiple of 8 up to 256"
    return None


def attention_backend(model: ModelConfig, precision: str) -> tuple[str, str]:
    """The backend to use, without measuring any, and why. Raises ConfigError when the one asked for cannot run here."""
    asked, head_dim = model.attention, model.head_dim
    assert head_dim is not None
    no_kernel = no_kernels_for(model, precision)
    window = model.sliding_window
    if asked != "auto":
        for name in dict.fromkeys(attention_parts(asked)):
            if name != "sdpa" and (problem := no_kernel or _problem_with(name, head_dim, precision, window)):
                raise ConfigError("model.attention", asked, f"sdpa on this machine: {problem}")
        return asked, "as configured"
    if no_kernel:
        return "sdpa", f"auto: {no_kernel}"
    no_flash = _problem_with("flash", head_dim, precision, window)
    if no_flash is None:
        return "flash", "auto: flash-attn runs"
    no_varlen = _problem_with("varlen", head_dim, precision, window)
    return ("sdpa", f"auto: {no_flash}; {no_varlen}") if no_varlen else ("varlen", f"auto: {no_flash}")


def kernel_lacks(name: str) -> str | None:
    """Which package `flash` or `flash3` lacks here; None if it is there, or `name` is of torch."""
    module, package = PACKAGES.get(name, ("", ""))
    return f"{package} is not installed" if module and importlib.util.find_spec(module) is None else None


def _check_window(backend: str, v: Tensor) -> None:
    """Raises ValueError unless a window of two tokens is one of two: v [1, 3, 1, K] holds 1, 2, 3, and equal queries and keys
    average what they see."""
    for segments in (None, segments_of(torch.zeros_like(v[..., 0, 0], dtype=torch.int64), 1, 3)):
        found = causal_attention(torch.zeros_like(v), torch.zeros_like(v), v, backend, segments, 2)
        if (found[0, :, 0, 0].tolist()) != [1.0, 1.5, 2.5]:
            raise ValueError("it takes another sliding window than asked for")


def _problem_with(backend: str, head_dim: int, precision: str, window: int | None) -> str | None:
    """Why the backend fails at a row and at three tokens in two segments, with two heads in a group, forward and backward: a
    package may be installed and lack the functions (flash-attn 4 does), or the kernels for this GPU."""
    for name in ATTENTION[backend]:
        if lacks := kernel_lacks(name):
            return lacks + (" (pip install flash-attn)" if name == "flash" else "")

    def trial() -> None:
        device, dtype = own_device(), torch.float16 if precision == "fp16" else torch.bfloat16
        for tokens, segments in (
            (64, None),  # cuDNN does not take every shorter row
            (3, segments_of(torch.tensor([[0, 0, 1]], device=device), 2, 2)),
        ):
            q, k = (
                torch.zeros(1, tokens, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
                for heads in (2, 1)
            )
            causal_attention(q, k, k, backend, segments).sum().backward()
        if window is not None:
            _check_window(backend, torch.arange(1.0, 4.0).to(q).view(1, 3, 1, 1).expand_as(k).contiguous())
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    problem = problem_of(trial)
    return problem and f"{backend} attention failed at a first call ({problem})"


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str,
    segments: Segments | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, each token seeing itself and what stands before it.

    Args:
        q: [B, S, H, K]. k, v: [B, S, G, K] with G a divisor of H (grouped-query attention).
        backend: a name in `ATTENTION`, whose pair says what computes whole rows and what computes segments.
        segments: of these tokens; attention stays inside each, and in one row may run over several sequences' tokens.
        window: positions that a token sees, its own included; None: all.
        positions: [B, S], with a window among tokens of which others were left out: no kernel knows these, so that SDPA with a
            mask takes the place of every backend. None: tokens follow each other.

    Returns:
        [B, S, H, K].
    """
    rows, parts = ATTENTION[backend]
    needs_mask = parts == "sdpa" or (window is not None and positions is not None)
    if needs_mask and segments is not None and torch.compiler.is_compiling():
        return attention_in_one_call(q, k, v, segments.ids, window, positions)
    if needs_mask and window is not None:
        return attention_in_window(q, k, v, window, positions, None if segments is None else segments.ids)
    if window is not None and rows not in WITH_WINDOW and segments is None:
        segments = _rows(q)
    if segments is not None:
        flat = _attention_in_segments(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), parts, segments, window
        )
        return flat.view_as(q)
    if rows in PACKAGES:
        if rows == "flash":  # spelled out, because a compiled graph cannot hold a search for a module
            from flash_attn import flash_attn_func as call
        else:
            from flash_attn_interface import flash_attn_func as call
        return _alone(call(q, k, v, causal=True, window_size=_before(window), **_flash_options()))
    if rows == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _sdpa(q, k, v)
    return _sdpa(q, k, v)


def _alone(found: Any) -> Tensor:
    """The output of a flash-attn function. Early versions of flash-attn 3 also return the softmax's normalisers."""
    out = found[0] if isinstance(found, tuple) else found
    assert isinstance(out, Tensor)
    return out


def _rows(q: Tensor) -> Segments:
    """Each row of q [B, S, H, K] as a segment."""
    rows, length = q.shape[:2]
    ids = torch.arange(rows, device=q.device).repeat_interleave(length)
    return segments_of(ids.view(rows, length), rows, length)


def _before(window: int | None) -> tuple[int, int]:
    """A kernel's `window_size`: how many tokens before and after its own a token sees; -1: all."""
    return (-1 if window is None else window - 1, 0)


def _flash_options() -> dict[str, bool]:
    """flash-attn does not ask torch whether its backward pass must add up in the same order each time."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


def _varlen_groups_heads() -> bool:
    """Whether `varlen_attn` takes fewer key heads than query heads: from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


def _attention_in_segments(
    q: Tensor, k: Tensor, v: Tensor, kernel: str, segments: Segments, window: int | None
) -> Tensor:
    """q [N, H, K], k and v [N, G, K] -> [N, H, K], without padding and without a mask. A window is for kernels alone."""
    _, ends, longest = segments
    if not q.shape[0]:
        return q + (k.sum() + v.sum())  # nothing, but each of the three gets its gradient: zeros
    if kernel in PACKAGES:
        if kernel == "flash":
            from flash_attn import flash_attn_varlen_func as call
        else:
            from flash_attn_interface import flash_attn_varlen_func as call
        options = {"causal": True, "window_size": _before(window)} | _flash_options()
        return _alone(call(q, k, v, ends, ends, longest, longest, **options))
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        if _varlen_groups_heads():
            out = varlen_attn(
                q,
                k,
                v,
                ends,
                ends,
                longest,
                longest,
                window_size=_before(window),
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=_before(window))
        assert isinstance(out, Tensor)
        return out
    lengths = [length for length in ends.diff().tolist() if length]
    return torch.cat(
        [
            _sdpa(*(x.unsqueeze(0) for x in part)).squeeze(0)
            for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ]
    )


class Attention(nn.Module):
    """Attn(x) of a layer, x already normed; heads are cut over tensor ranks."""

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        *,
        backend: str,
        make: ParamMaker,
        output_std: float,
        turns: bool = True,
        window: int | None = None,
        recompute: bool = False,
    ):
        """`backend`: one, or `WHOLE/CHOSEN` for all tokens and for chosen ones. `turns`: whether queries and keys turn to their
        positions. `window`: see `causal_attention`."""
        super().__init__()
        assert model.head_dim is not None and model.num_kv_heads is not None
        d, self.head_dim, self.backends = model.hidden_size, model.head_dim, attention_parts(backend)
        self.tp, self.seq, self.recompute, self.window = make.tp, make.seq, recompute, window
        init = normal(model.init_std)
        self.q_proj = ColumnParallelLinear(
            f"{name}.q_proj", d, model.num_heads * self.head_dim, make=make, init=init, bias=model.qkv_bias
        )
        self.k_proj = KeyValueLinear(
            f"{name}.k_proj", d, model.num_kv_heads, self.head_dim, make=make, init=init, bias=model.qkv_bias
        )
        self.v_proj = KeyValueLinear(
            f"{name}.v_proj", d, model.num_kv_heads, self.head_dim, make=make, init=init, bias=model.qkv_bias
        )
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj",
            model.num_heads * self.head_dim,
            d,
            make=make,
            init=normal(output_std),
            bias=model.output_bias,
        )
        self.rotary = Rotary(self.head_dim, model.rope) if turns else None
        normed = {"hybridnorm": "qkv"}.get(model.normalization, "qk" if model.qk_norm else "")
        self.q_norm, self.k_norm, self.v_norm = (
            HeadNorm(f"{name}.{kind}_norm", self.head_dim, model.norm_eps, make=make)
            if kind in normed
            else None
            for kind in "qkv"
        )

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, S, H/tp, K] and k [B, S, G/tp, K], not yet turned to their positions; x has passed `enter_tp`."""
        q, k = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def values(self, x: Tensor) -> Tensor:
        """v [B, S, G/tp, K]; x has passed `enter_tp`."""
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return v if self.v_norm is None else self.v_norm(v)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
        length: int,
        segments: Segments | None,
        whole: bool = False,
    ) -> Tensor:
        """[B, S, H/tp * K], the input of the output projection. Arguments as in `forward`."""
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions, length)
        window = self.window if self.window is not None and self.window < length else None
        of_whole, of_chosen = self.backends
        if whole:
            return causal_attention(q, k, v, of_whole, segments, window).flatten(-2)
        return causal_attention(q, k, v, of_chosen, segments, window, positions).flatten(-2)

    def term(self, *inputs: Any) -> Tensor:
        """This rank's term of the output, for the arguments of `attend`."""
        return self.o_proj.term(self.attend(*inputs))

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None,
        length: int,
        segments: Segments | None = None,
        whole: bool = False,
    ) -> Tensor:
        """x [B, S/seq, D] -> [B, S/seq, D].

        Args:
            positions: [B, S], below `length`; None for 0 .. S-1. segments: see `causal_attention`.
            whole: whether no token was left out, so that within a segment positions follow each other.
        """
        x = enter_tp(x, self.tp, self.seq)
        inputs = (*self.queries_keys(x), self.values(x), positions, length, segments, whole)
        return self.o_proj.sum_of(recomputed(self.term, *inputs) if self.recompute else self.term(*inputs))
