"""The transformer layer, and what layers pass on to each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.config import ModelConfig
from megadyn.kernels.rule import fused
from megadyn.model.attention import Attention
from megadyn.model.compiled import compiled
from megadyn.model.documents import Documents, Segments
from megadyn.model.norm import RMSNorm
from megadyn.model.recompute import recomputed
from megadyn.parallel.grid import Axis
from megadyn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megadyn.parallel.loss import LogitOptions
from megadyn.parallel.mappings import enter_tp
from megadyn.parallel.params import ParamMaker, normal


class Stream(NamedTuple):
    """What a layer passes to the next."""

    hidden: Tensor
    """[B, T/seq, D]: under sequence parallelism this rank's part of the sequence"""
    score: Tensor | None = None
    """[B, T/seq] in float32: a layer's score of each token for the next layer (`Layer.takes_score`). Carries gradient.
    A kind that is limited to one pipeline stage may pass on several scores, [B, T/seq, n]."""
    documents: Documents | None = None
    """Document borders in the whole sequence, which attention and averages must not cross; None: one document per sample."""


@dataclass(frozen=True)
class LayerContext:
    """Everything that layers are built from."""

    model: ModelConfig
    make: ParamMaker
    attention: str = "sdpa"
    eod: int | None = None
    """Token that ends a document, if samples are masked by document."""
    first_sample: int = 0
    """Position in a step's global batch of this data-parallel rank's first sample."""
    recompute: str = "none"
    """`training.recompute`. Routing decisions are never recomputed."""
    compile: bool = False
    """`training.compile`, used in training only: evaluation is too short to repay another graph."""
    z_weight: float = 0.0
    """`training.z_loss_weight`."""

    @property
    def logits(self) -> LogitOptions:
        return LogitOptions(self.model.logit_softcap, self.z_weight)


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), x [..., D]; the inner width is cut over tensor ranks."""

    def __init__(
        self, name: str, model: ModelConfig, *, make: ParamMaker, output_std: float, recompute: bool = False
    ):
        super().__init__()
        assert model.ffn_size is not None
        d, width, init = model.hidden_size, model.ffn_size, normal(model.init_std)
        self.tp, self.seq, self.recompute = make.tp, make.seq, recompute
        self.gate_proj = ColumnParallelLinear(f"{name}.gate_proj", d, width, make=make, init=init)
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", d, width, make=make, init=init)
        self.down_proj = RowParallelLinear(f"{name}.down_proj", width, d, make=make, init=normal(output_std))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T/seq, D] -> [B, T/seq, D]."""
        x = enter_tp(x, self.tp, self.seq)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj.sum_of(
            recomputed(self.down, gate, up) if self.recompute else self.down(gate, up)
        )

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both [B, T, F/tp] -> this rank's term of the output, [B, T, D]."""
        return self.down_proj.term(swiglu(gate, up))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; one kernel if `training.kernels` selects Triton."""
    if fused(gate):
        from megadyn.kernels import swiglu as kernel

        return kernel.swiglu(gate, up)
    return F.silu(gate) * up


class Layer(nn.Module):
    """Base of all transformer layers: Block(h) = Attn(Norm(h)) + MLP(Norm(h + Attn(Norm(h)))), with Qwen2's names.

    `lns` multiplies both norms' outputs by 1/sqrt(layer), counted from 1 (arXiv 2502.05795). `hybridnorm` normalizes q,
    k and v instead of attention's input, and the whole stream after attention: Z = Norm(h + Attn(h)), out = Z + MLP(Z)
    (arXiv 2503.04598).
    """

    block_is_split = True
    """Whether, under sequence parallelism, the block works on this rank's part of the sequence."""
    takes_score = False
    """Whether it reads `Stream.score` from the previous layer; a stage boundary between the two must then pass the score on."""

    def __init__(self, ctx: LayerContext, index: int):
        super().__init__()
        model, self.index, self.seq = ctx.model, index, ctx.make.seq
        self.compile_run = ctx.compile
        self.recompute, inner = ctx.recompute == "full", ctx.recompute == "selective"
        make = ctx.make if self.block_is_split else replace(ctx.make, seq=Axis("seq"))
        self.name = name = f"model.layers.{index}"
        self.hybrid = model.normalization == "hybridnorm"
        lns = model.normalization == "lns"
        scale = (index + 1) ** -0.5 if lns else 1.0
        # Initial output projections are smaller in deeper models (GPT-2), so that the residual sum keeps its size. LNS
        # scales itself.
        output_std = model.init_std if lns else model.init_std / (2 * model.num_layers) ** 0.5
        self.input_layernorm = (
            nn.Identity()
            if self.hybrid
            else RMSNorm(f"{name}.input_layernorm", model.hidden_size, model.norm_eps, make=make, scale=scale)
        )
        self.self_attn = Attention(
            f"{name}.self_attn",
            model,
            backend=ctx.attention,
            make=make,
            output_std=output_std,
            turns=index not in model.rope.skip_layers,
            window=model.window_of(index),
            recompute=inner,
        )
        self.post_attention_layernorm = RMSNorm(
            f"{name}.post_attention_layernorm", model.hidden_size, model.norm_eps, make=make, scale=scale
        )
        self.mlp = Mlp(f"{name}.mlp", model, make=make, output_std=output_std, recompute=inner)

    def dense(self, hidden: Tensor, documents: Documents | None = None) -> Tensor:
        """h + Block(h) for every token, [B, T/seq, D]."""
        segments, positions = documents or (None, None)
        normed, length = self.input_layernorm(hidden), self.length(hidden)
        return self.feed_forward(hidden, self.self_attn(normed, positions, length, segments, whole=True))

    def length(self, hidden: Tensor) -> int:
        """T, for hidden [B, T/seq, D]."""
        return hidden.shape[1] * self.seq.size

    def feed_forward(self, hidden: Tensor, update: Tensor) -> Tensor:
        """The part after attention: h and Attn -> h + Block(h)."""
        attended, normed = self.post_attention_layernorm.of_sum(hidden, update)
        return (normed if self.hybrid else attended) + self.mlp(normed)

    def delta(
        self, hidden: Tensor, positions: Tensor, length: int, segments: Segments | None = None
    ) -> Tensor:
        """Block(h) for tokens [B, S, D] from `positions` [B, S] of sequences of `length` tokens. `segments`: see
        `causal_attention`."""
        update = self.self_attn(self.input_layernorm(hidden), positions, length, segments)
        if self.hybrid:
            return self.feed_forward(hidden, update) - hidden
        _, normed = self.post_attention_layernorm.of_sum(hidden, update)
        return update + self.mlp(normed)  # adds only updates, so that no large terms cancel

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Calls function(*inputs), a method of this layer, compiled and with recomputation if configured.

        Routing decisions are made outside `function` and passed in, so recomputation reuses them. Statistics are
        recorded outside too, so they count once.
        """
        if self.compile_run and torch.is_grad_enabled():
            hidden = inputs[0].hidden if isinstance(inputs[0], Stream) else inputs[0]
            # Grow the table outside of the graph, which requires a fixed size.
            if self.self_attn.rotary is not None:
                self.self_attn.rotary.angles(self.length(hidden), hidden)
            function = partial(compiled, function)
        return recomputed(function, *inputs) if self.recompute else function(*inputs)
