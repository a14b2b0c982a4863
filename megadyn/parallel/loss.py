"""Next-token cross-entropy straight from the last hidden states; whole logits never exist.

The logits of a few thousand tokens at a time are made, turned into loss and gradients, and dropped, as in
memory-efficient fused losses (Liger kernel, arXiv 2410.10989), here with the vocabulary cut over tensor ranks
as in Megatron-LM (arXiv 1909.08053, section 3).
"""

from typing import Any

import torch
from torch import Tensor

from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import max_over, sum_over

CHUNK_ELEMENTS = 2**25
"""Logits made at once, on one rank: 128 MiB in fp32."""


def upcast(x: Tensor) -> Tensor:
    """At least float32: half precisions are widened, float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, tp: Axis, training: bool) -> Tensor:
        """hidden [N, D], weight [V/tp, D], labels [N] -> mean loss, a scalar, equal on all tensor ranks."""
        rows = weight.shape[0]
        first = tp.rank * rows
        chunk = max(1, CHUNK_ELEMENTS // rows)
        grad_hidden = torch.empty_like(hidden) if training else None
        grad_weight = torch.zeros_like(weight, dtype=upcast(weight[:0]).dtype) if training else None   # summed over chunks
        total = upcast(hidden).new_zeros(())
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = upcast(hidden[part] @ weight.T)                              # [n, V/tp]
            logits[:, max(0, vocab_size - first):] = -torch.inf                   # the padding never wins
            logits -= max_over(logits.amax(dim=1), tp).unsqueeze(1)
            local = labels[part] - first
            elsewhere = (local < 0) | (local >= rows)
            index = local.masked_fill(elsewhere, 0).unsqueeze(1)
            target = logits.gather(1, index).squeeze(1).masked_fill(elsewhere, 0)
            probs = logits.exp_()
            sums, target = sum_over(torch.stack([probs.sum(dim=1), target]), tp)
            total += (sums.log() - target).sum()
            if grad_hidden is not None and grad_weight is not None:
                probs /= sums.unsqueeze(1)
                probs.scatter_add_(1, index, -(~elsewhere).to(probs.dtype).unsqueeze(1))
                grad_logits = probs.to(weight.dtype)                    # the mean's 1/N waits for backward: no underflow
                torch.mm(grad_logits, weight, out=grad_hidden[part])
                grad_weight += grad_logits.T @ hidden[part]
        ctx.tp, ctx.count, ctx.dtype = tp, hidden.shape[0], weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / ctx.count
        return grad_hidden * grad, (grad_weight * grad).to(ctx.dtype), None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, tp: Axis) -> Tensor:
    """Mean of -log softmax(hidden W^T)[label] over all tokens.

    Args:
        hidden: [..., D], equal on all tensor ranks; the caller has passed it through `enter_tp`.
        weight: [V/tp, D], this rank's rows; rows at and beyond `vocab_size` are padding.
        labels: [...], ids over the whole vocabulary.
    """
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), vocab_size, tp, torch.is_grad_enabled())
