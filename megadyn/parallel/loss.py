"""Next-token cross-entropy computed directly from the last hidden states; the full logits never exist.

All tokens are multiplied with one block of the vocabulary at a time. The block's logits are added to each token's sum
of exponentials and dropped. The backward pass computes them again, as Cut Cross-Entropy does (arXiv 2411.09009). That
is a fourth matrix product in addition to three, but the gradient of the whole weight is not accumulated repeatedly in
float32. If there is only one block, its logits are kept. The vocabulary is cut over tensor ranks as in Megatron-LM
(arXiv 1909.08053, section 3).
"""

import math
from typing import Any

import torch
from torch import Tensor

from megadyn.costs.memory import LOGITS_AT_ONCE
from megadyn.parallel.grid import Axis
from megadyn.parallel.linear import upcast
from megadyn.parallel.mappings import max_over, sum_over


class _LinearCrossEntropy(torch.autograd.Function):
    """N tokens, D hidden size, V words, v of them per block."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, tp: Axis, training: bool
    ) -> Tensor:
        """hidden [N, D], weight [V/tp, D], labels [N] -> mean loss, a scalar, equal on all tensor ranks."""
        count, rows = hidden.shape[0], weight.shape[0]
        local = labels - tp.rank * rows
        own = min(rows, max(0, vocab_size - tp.rank * rows))  # rows after these are padding
        size = max(1, LOGITS_AT_ONCE // count)
        blocks = [slice(start, min(own, start + size)) for start in range(0, own, size)]
        wide = upcast(weight[:0]).dtype
        # Over the blocks so far: the highest logit, the sum of exponentials relative to it, and the label's logit.
        top = hidden.new_full((count,), torch.finfo(wide).min, dtype=wide)
        total, target = top.new_zeros(count), top.new_zeros(count)
        for block in blocks:
            logits = hidden @ weight[block].T  # [N, v]
            here, index = _in_block(local, block)
            target += logits.gather(1, index).squeeze(1) * here
            highest = torch.maximum(top, logits.amax(dim=1))
            logits = _minus(logits, highest).exp_()
            total, top = total * (top - highest).exp_() + logits.sum(dim=1), highest
        # No rank has the logit of an invalid label; a 0 would give a loss that looks valid.
        target.masked_fill_((labels < 0) | (labels >= vocab_size), math.nan)
        highest = max_over(top, tp)
        share = (top - highest).exp_()
        total, target = sum_over(torch.stack([total * share, target]), tp)
        grad_logits = None
        if training and len(blocks) == 1:
            grad_logits = _minus_labels(logits.mul_((share / total).unsqueeze(1)), local, blocks[0]).to(
                weight.dtype
            )
        ctx.blocks, ctx.tp = blocks, tp
        ctx.save_for_backward(hidden, weight, local, highest + total.log(), grad_logits)
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
                grad_logits = _minus_labels(
                    _minus(hidden @ weight[block].T, log_total).exp_(), local, block
                ).to(weight.dtype)
            grad_hidden += grad_logits @ weight[block]
            torch.mm(grad_logits.T, scaled, out=grad_weight[block])
        grad_weight[ctx.blocks[-1].stop if ctx.blocks else 0 :] = 0  # padding
        return grad_hidden.mul_(scale).to(hidden.dtype), grad_weight, None, None, None, None


def _in_block(local: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which of the labels [N] are in the block, [N], and their columns in it, [N, 1]; 0 for the others."""
    here = (local >= block.start) & (local < block.stop)
    return here, (local - block.start).masked_fill(~here, 0).unsqueeze(1)


def _minus(logits: Tensor, shift: Tensor) -> Tensor:
    """logits [N, v] - shift [N] in the dtype of `shift`, which is wider or the same; in place if it is the same."""
    return logits.sub_(shift.unsqueeze(1)) if logits.dtype == shift.dtype else logits - shift.unsqueeze(1)


def _minus_labels(probs: Tensor, local: Tensor, block: slice) -> Tensor:
    """Probabilities [N, v] minus 1 at the labels, in place: N times the gradient of the mean loss with respect to the logits."""
    here, index = _in_block(local, block)
    return probs.scatter_add_(1, index, -here.to(probs.dtype).unsqueeze(1))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, tp: Axis
) -> Tensor:
    """Mean of -log softmax(hidden W^T)[label] over all tokens.

    Args:
        hidden: [..., D], equal on all tensor ranks; the caller must pass it through `enter_tp` first.
        weight: [V/tp, D], this rank's rows; rows from `vocab_size` on are padding.
        labels: [...], ids in the whole vocabulary; an id outside of it makes the loss NaN.
    """
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), vocab_size, tp, torch.is_grad_enabled()
    )
