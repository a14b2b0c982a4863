"""Next-token cross-entropy computed directly from the last hidden states; the full logits never exist.

All tokens are multiplied with one block of the vocabulary at a time. The block's logits are added to each token's sum
of exponentials and dropped. The backward pass computes them again, as Cut Cross-Entropy does (arXiv 2411.09009). That
is a fourth matrix product in addition to three, but the gradient of the whole weight is not accumulated repeatedly in
float32. If there is only one block, its logits are kept. Kernels (`kernels/cross_entropy.py`) read a block of logits once
and put its gradient in its place. The vocabulary is cut over tensor ranks as in Megatron-LM (arXiv 1909.08053, section 3).

Two options: logits capped to c tanh(logits / c), as in Gemma 2 (arXiv 2408.00118); and the z-loss, the mean square of each
token's log of the sum of exponentials, times a weight (PaLM, arXiv 2204.02311, section 5). The z-loss adds to the gradient
alone; the loss that is returned does not contain it.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadyn.costs.memory import KERNEL_LOGITS_AT_ONCE, LOGITS_AT_ONCE
from megadyn.kernels.rule import fused
from megadyn.parallel.grid import Axis
from megadyn.parallel.linear import upcast
from megadyn.parallel.mappings import max_over, sum_over

ALIGNED = 128
"""Tensor cores want the rows of a block at such multiples."""


class LogitOptions(NamedTuple):
    softcap: float | None = None
    """Bound of the logits; None leaves them unbounded."""
    z_weight: float = 0.0
    """Weight of the z-loss."""


PLAIN = LogitOptions()


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap) in float32 or wider; the same logits without a cap."""
    return logits if softcap is None else (upcast(logits) / softcap).tanh() * softcap


class _Sums(NamedTuple):
    """Of N tokens over the blocks so far, each [N] in float32 or wider."""

    top: Tensor
    """The highest logit."""
    total: Tensor
    """The sum of exponentials, relative to it."""
    target: Tensor
    """The label's logit."""


class _LinearCrossEntropy(torch.autograd.Function):
    """N tokens, D hidden size, V words, v of them per block."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        tp: Axis,
        options: LogitOptions,
        training: bool,
    ) -> Tensor:
        """hidden [N, D], weight [V/tp, D], labels [N] -> mean loss, a scalar, equal on all tensor ranks."""
        count, rows = hidden.shape[0], weight.shape[0]
        local = labels - tp.rank * rows
        own = min(rows, max(0, vocab_size - tp.rank * rows))  # rows after these are padding
        by_kernel = fused(hidden)
        size = _words_of_block(KERNEL_LOGITS_AT_ONCE if by_kernel else LOGITS_AT_ONCE, count)
        blocks = [slice(start, min(own, start + size)) for start in range(0, own, size)]
        keeps = training and len(blocks) == 1
        wide = upcast(weight[:0]).dtype
        top = hidden.new_full((count,), torch.finfo(wide).min, dtype=wide)
        sums = _Sums(top, top.new_zeros(count), top.new_zeros(count))
        for block in blocks:
            logits = hidden @ weight[block].T  # [N, v]
            if by_kernel:
                _kernels().scan(logits, local, block.start, sums, options.softcap)
                continue
            logits = capped(logits, options.softcap)
            slope = _slope(logits, options.softcap) if keeps else None
            logits, sums = _taken_in(logits, local, block, sums)
        top, total, target = sums
        # No rank has the logit of an invalid label; a 0 would give a loss that looks valid.
        target.masked_fill_((labels < 0) | (labels >= vocab_size), math.nan)
        highest = max_over(top, tp)
        share = (top - highest).exp_()
        total, target = sum_over(torch.stack([total * share, target]), tp)
        log_total = highest + total.log()
        grad_logits = None
        if keeps and by_kernel:
            grad_logits = _kernels().into_gradient(logits, local, blocks[0].start, log_total, *options)
        elif keeps:
            probs = logits.mul_((share / total).unsqueeze(1))
            grad_logits = _grad_logits(probs, log_total, local, blocks[0], slope, options).to(weight.dtype)
        ctx.blocks, ctx.options = blocks, options
        ctx.save_for_backward(hidden, weight, local, log_total, grad_logits)
        return (total.log() - (target - highest)).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, log_total, grad_logits = ctx.saved_tensors
        scale = grad / len(hidden)
        scaled = (hidden * scale).to(hidden.dtype)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=log_total.dtype)  # accumulated over blocks
        grad_weight = torch.empty_like(weight)
        for block in ctx.blocks:
            if len(ctx.blocks) > 1:
                grad_logits = _recomputed(hidden, weight[block], log_total, local, block, ctx.options)
            grad_hidden += grad_logits @ weight[block]
            torch.mm(grad_logits.T, scaled, out=grad_weight[block])
        grad_weight[ctx.blocks[-1].stop if ctx.blocks else 0 :] = 0  # padding
        return grad_hidden.mul_(scale).to(hidden.dtype), grad_weight, None, None, None, None, None


def _words_of_block(logits: int, tokens: int) -> int:
    """As many words as give at most so many logits. A multiple of `ALIGNED`, unless there are fewer."""
    words = max(1, logits // tokens)
    return words if words < ALIGNED else words - words % ALIGNED


def _taken_in(logits: Tensor, local: Tensor, block: slice, sums: _Sums) -> tuple[Tensor, _Sums]:
    """The block's exponentials [N, v], relative to the highest logit so far, and the sums with them. Without a kernel."""
    top, total, target = sums
    here, index = _in_block(local, block)
    target += logits.gather(1, index).squeeze(1) * here
    highest = torch.maximum(top, logits.amax(dim=1))
    powers = _minus(logits, highest).exp_()
    return powers, _Sums(highest, total * (top - highest).exp_() + powers.sum(dim=1), target)


def _kernels() -> ModuleType:
    from megadyn.kernels import cross_entropy

    return cross_entropy


def _in_block(local: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which of the labels [N] are in the block, [N], and their columns in it, [N, 1]; 0 for the others."""
    here = (local >= block.start) & (local < block.stop)
    return here, (local - block.start).masked_fill(~here, 0).unsqueeze(1)


def _minus(logits: Tensor, shift: Tensor) -> Tensor:
    """logits [N, v] - shift [N] in the dtype of `shift`, which is wider or the same; in place if it is the same."""
    return logits.sub_(shift.unsqueeze(1)) if logits.dtype == shift.dtype else logits - shift.unsqueeze(1)


def _slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Derivative [N, v] of capped logits with respect to the logits before; None without a cap."""
    return None if softcap is None else 1 - (logits / softcap).square()


def _grad_logits(
    probs: Tensor, log_total: Tensor, local: Tensor, block: slice, slope: Tensor | None, options: LogitOptions
) -> Tensor:
    """N times the gradient [N, v] of mean loss and z-loss with respect to the logits before a cap, in place of `probs`."""
    here, index = _in_block(local, block)
    if options.z_weight:
        probs.mul_((1 + 2 * options.z_weight * log_total).unsqueeze(1))
    probs.scatter_add_(1, index, -here.to(probs.dtype).unsqueeze(1))
    return probs if slope is None else probs.mul_(slope)


def _recomputed(
    hidden: Tensor, weight: Tensor, log_total: Tensor, local: Tensor, block: slice, options: LogitOptions
) -> Tensor:
    """`_grad_logits` in the weight's dtype, from the hidden states; frees what it needs on the way."""
    if fused(hidden):
        return _kernels().into_gradient(hidden @ weight.T, local, block.start, log_total, *options)
    logits = capped(hidden @ weight.T, options.softcap)
    slope = _slope(logits, options.softcap)
    logits = _minus(logits, log_total).exp_()
    return _grad_logits(logits, log_total, local, block, slope, options).to(weight.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp: Axis,
    options: LogitOptions = PLAIN,
) -> Tensor:
    """Mean of -log softmax(hidden W^T)[label] over all tokens.

    Args:
        hidden: [..., D], equal on all tensor ranks; the caller must pass it through `enter_tp` first.
        weight: [V/tp, D], this rank's rows; rows from `vocab_size` on are padding.
        labels: [...], ids in the whole vocabulary; an id outside of it makes the loss NaN.
        options: a cap, which the loss contains, and a z-loss, which only the gradient contains.
    """
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), vocab_size, tp, options, torch.is_grad_enabled()
    )
