"""Two passes over a block of logits: one for the sums of its exponentials, one that puts the gradient in its place. Import only
if Triton can run.

N tokens, v words of the block. A program handles one token, in the first pass one piece of the block after another. All is
computed in float32. `softcap` caps logits to softcap tanh(logits / softcap); None leaves them unbounded.
"""

import triton
import triton.language as tl
from torch import Tensor

from megadyn.kernels.launch import has_values

BLOCK = 4096
"""Words that a program reads at once."""
WARPS = 8


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _scan(
    logits, labels, top, total, target, first, words, softcap, has_cap: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # 64 bits, because N * v may exceed 2^31
    label = tl.load(labels + row) - first
    highest = tl.load(top + row)
    mass = tl.load(total + row)
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < words
        value = tl.load(logits + row * words + column, mask=inside, other=0.0).to(tl.float32)
        if has_cap:
            value = softcap * _tanh(value / softcap)
        value = tl.where(inside, value, float("-inf"))
        higher = tl.maximum(highest, tl.max(value, axis=0))
        mass = mass * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher), axis=0)
        highest = higher
    tl.store(top + row, highest)
    tl.store(total + row, mass)
    if (label >= 0) & (label < words):
        value = tl.load(logits + row * words + label).to(tl.float32)
        if has_cap:
            value = softcap * _tanh(value / softcap)
        tl.store(target + row, value)


@triton.jit
def _gradient(
    logits,
    labels,
    log_total,
    first,
    words,
    softcap,
    z_weight,
    has_cap: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < words
    label = tl.load(labels + row) - first
    whole = tl.load(log_total + row)
    at = logits + row * words + column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if has_cap:
        bent = _tanh(value / softcap)
        value = softcap * bent
        slope = 1 - bent * bent
    grad = tl.exp(value - whole) * (1 + 2 * z_weight * whole)
    grad = tl.where(column == label, grad - 1, grad) * slope
    tl.store(at, grad.to(logits.dtype.element_ty), mask=inside)


def scan(
    logits: Tensor,
    labels: Tensor,
    first: int,
    sums: tuple[Tensor, Tensor, Tensor],
    softcap: float | None,
) -> None:
    """Takes a block of logits [N, v] into each token's highest logit, sum of exponentials relative to it, and label's logit.

    Args:
        labels: [N] int64. first: the word of the block's first column; labels elsewhere leave their logit as it is.
        sums: three tensors [N] in float32, changed in place.
    """
    rows, words = logits.shape
    top, total, target = sums
    if rows and has_values(logits, moved=logits.nbytes + labels.nbytes + 4 * top.nbytes):
        _scan[(rows,)](
            logits,
            labels,
            top,
            total,
            target,
            first,
            words,
            softcap or 0.0,
            has_cap=softcap is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(words)),
            num_warps=WARPS,
        )


def into_gradient(
    logits: Tensor, labels: Tensor, first: int, log_total: Tensor, softcap: float | None, z_weight: float
) -> Tensor:
    """Replaces a block of logits [N, v] by N times the gradient of mean loss and z-loss with respect to them, and returns it.

    Args:
        labels, first: as in `scan`. log_total: [N] in float32, log of the sum of exponentials over all words.
    """
    rows, words = logits.shape
    if rows and has_values(logits, moved=2 * logits.nbytes + labels.nbytes + log_total.nbytes):
        block = min(BLOCK, triton.next_power_of_2(words))
        _gradient[(rows, triton.cdiv(words, block))](
            logits,
            labels,
            log_total,
            first,
            words,
            softcap or 0.0,
            z_weight,
            has_cap=softcap is not None,
            BLOCK=block,
            num_warps=WARPS,
        )
    return logits
