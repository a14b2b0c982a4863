"""Bytes that the pieces of a layer keep for their backward pass.

    n  tokens of a micro-batch that a layer works on     d  hidden size     f  feed-forward width of this rank
    m  this rank's part of n under sequence parallelism (arXiv 2205.05198), otherwise n          b  bytes per number
    q  width of this rank's queries                      k  width of its keys, or values          c  chosen tokens

Under sequence parallelism, norms, residuals, priors, routers and tensors sent between stages have m tokens. Inputs of
linear layers have n: we keep the gathered input, whereas the paper keeps only the rank's part and gathers it again.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megadyn.costs.shape import Shape, capacity_count

LOGITS_AT_ONCE = 2**24
"""Logits that the loss computes at once on one rank with torch's operations, which copy them in fp32: 64 MiB."""
KERNEL_LOGITS_AT_ONCE = 2**26
"""The same with kernels, which put gradients in the place of logits: 128 MiB in bf16. Fewer blocks mean fewer passes over the
gradient of the hidden states."""


@dataclass(frozen=True)
class Workload:
    """Everything about one rank's computation that activations depend on."""

    model: Shape
    batch: int
    """Samples per micro-batch."""
    length: int
    tensor: int
    bytes: int
    """Bytes per number: 4 in fp32, 2 in bf16 and fp16."""
    recompute: str
    """`training.recompute`."""
    documents: bool = False
    """Whether attention is masked by document."""
    sequence: bool = False
    """`parallel.sequence`: whether tensor ranks split the sequence."""
    fused: bool = True
    """Whether GPU kernels are used. On a CPU, RMSNorm also keeps float32 copies, attention in segments keeps two outputs, and
    SwiGLU keeps silu(gate)."""

    @property
    def parts(self) -> int:
        """Parts that the sequence is split into: one per tensor rank."""
        return self.tensor if self.sequence else 1

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """d, q, k, f"""
        model, t = self.model, self.tensor
        assert model.head_dim and model.num_kv_heads and model.ffn_size
        return (
            model.hidden_size,
            model.num_heads // t * model.head_dim,
            max(1, model.num_kv_heads // t) * model.head_dim,
            model.ffn_size // t,
        )

    @property
    def tokens(self) -> int:
        """n"""
        return self.batch * self.length

    @property
    def part(self) -> float:
        """m"""
        return self.tokens / self.parts

    def chosen(self, capacity: float) -> int:
        """c, if each sequence contributes that share of its tokens."""
        return self.batch * capacity_count(capacity, self.length)

    @property
    def turned(self) -> int:
        """Bytes per token of cosine and sine, if they are looked up."""
        return 4 * (self.model.head_dim or 0)

    @property
    def segments(self) -> int:
        """Bytes per token of attention in segments: its outputs, and their copy as one tensor."""
        _, q, _, _ = self.widths
        return 0 if self.fused else self.bytes * q

    @property
    def inner(self) -> int:
        """Bytes per token that the feed-forward keeps of its inner width: gate, up and their product."""
        _, _, _, f = self.widths
        return self.bytes * f * (3 if self.fused else 4)

    def norm(self, width: int, is_kept: bool = False) -> int:
        """Bytes per token that RMSNorm keeps; `is_kept`: its input is already kept by something else."""
        if self.fused:
            return 4 + (0 if is_kept else self.bytes * width)
        return 4 + 4 * width + (0 if is_kept and self.bytes == 4 else 4 * width)


class Kept(NamedTuple):
    """Bytes that one layer keeps for one micro-batch."""

    input: float
    """The layer's own input, if something in it needs that unchanged."""
    inside: float
    """Kept by what `training.recompute: full` recomputes, in addition to the input."""
    inner: float
    """The part of `inside` that `selective` recomputes."""
    outside: float
    """Always kept: by a router."""
    working: float
    """Additional memory while the layer's backward pass runs."""


def block_kept(work: Workload, n: float, *, has_own_input: bool = False, parts: int = 1) -> float:
    """Attention and feed-forward on `n` tokens, divided by `parts` where they are not split by heads and widths. Their
    input is counted only if it is not the layer's input."""
    (d, q, k, _), b = work.widths, work.bytes
    heads = q // (work.model.head_dim or 1)
    attention = b * (2 * q + 2 * k) + 4 * heads
    if work.model.normalization == "hybridnorm":
        whole, split = (
            b * d * (has_own_input or parts > 1) + work.norm(q) + 2 * work.norm(k) + b * d,
            work.norm(d),
        )
    else:
        whole, split = 2 * b * d, work.norm(d, is_kept=not has_own_input) + work.norm(d)
        whole += work.norm(q) + work.norm(k) if work.model.qk_norm else 0
    return n * (whole + split / parts + attention + work.inner)


def inner_kept(work: Workload, n: float, attending: float) -> float:
    """Attention's averages, and all that the feed-forward keeps of its inner width but gate and up."""
    (_, q, _, f), b = work.widths, work.bytes
    return n * (work.inner - 2 * b * f) + attending * (b * q + 4 * q // (work.model.head_dim or 1))


def dense_kept(work: Workload) -> Kept:
    """A layer that processes every token."""
    return Kept(
        own_input(work),
        whole_block(work),
        inner_kept(work, work.tokens, work.tokens),
        0,
        work.tokens * backward_bytes(work),
    )


def skipping_kept(
    work: Workload, capacity: float, *, input: float = 0.0, outside: float = 0.0, varies: bool = False
) -> Kept:
    """A layer whose whole block runs on the share `capacity` of each sequence.

    Args:
        input: bytes of the layer's input that something outside the block keeps. outside: what a router keeps.
        varies: whether sequences contribute different numbers of tokens.
    """
    d, _, _, _ = work.widths
    c = work.chosen(capacity)
    # A block on chosen tokens works on all of them on every tensor rank.
    block = block_kept(work, c, has_own_input=True) + c * (
        2 * work.bytes * d + work.turned + work.segments * (work.documents or varies)
    )
    return Kept(
        input,
        block,
        inner_kept(work, c, c),
        outside,
        c * backward_bytes(work) + 2 * work.bytes * d * work.part,
    )


def router_kept(work: Workload, values: int) -> float:
    """What a two-layer router keeps, with `values` per token between its layers. It runs in float32, so in half
    precision it also keeps a copy of its input."""
    d, _, _, _ = work.widths
    return work.part * 4 * (values + d * (work.bytes < 4))


def own_input(work: Workload) -> float:
    """The input of a dense layer, if something in it needs that unchanged."""
    is_needed = work.parts == 1 if work.model.normalization == "hybridnorm" else work.fused or work.bytes == 4
    return work.part * work.bytes * work.model.hidden_size * is_needed


def whole_block(work: Workload) -> float:
    """What a block on all tokens keeps."""
    n = work.tokens
    return block_kept(work, n, parts=work.parts) + n * (work.turned + work.segments) * work.documents


def backward_bytes(work: Workload) -> float:
    """Bytes per token while a block's backward pass runs: gradients of the feed-forward's inner width, and of the
    residual stream."""
    d, _, _, f = work.widths
    return work.bytes * (2 * f + d)
