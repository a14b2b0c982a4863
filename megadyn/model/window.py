"""Causal attention by torch's SDPA with a mask: within a sliding window, also among tokens of which others were left out, and
within segments in a compiled graph."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 256
"""Queries in a block at least, so that a short window does not make many small calls."""


def attention_in_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, positions: Tensor | None, ids: Tensor | None
) -> Tensor:
    """Each token sees itself and earlier tokens of its segment at most `window` - 1 positions before it. Takes block after
    block of queries with the keys that they can see, by torch's SDPA with a mask: O(S * window), and no square in memory.

    Args:
        q: [B, S, H, K]. k, v: [B, S, G, K] with G a divisor of H.
        positions: [B, S], rising within a segment; None: tokens follow each other, so that their places count.
        ids: [B, S], the segment of each token, ascending; None: each row is one.

    Returns:
        [B, S, H, K].
    """
    length = q.shape[1]
    if not length:
        return q + (k.sum() + v.sum())  # nothing, but each of the three gets its gradient: zeros
    q, k, v = _heads_first(q, k, v)
    place = torch.arange(length, device=q.device).unsqueeze(0)
    where = place if positions is None else positions
    block, out = max(window, LEAST), []
    for start in range(0, length, block):
        mine = slice(start, min(start + block, length))
        # Positions rise at least as fast as places, so no key before this one is near enough.
        seen = slice(max(0, start - window + 1), mine.stop)
        mask = place[:, mine, None] >= place[:, None, seen]
        mask = mask & (where[:, mine, None] - where[:, None, seen] < window)
        if ids is not None:
            mask = mask & (ids[:, mine, None] == ids[:, None, seen])
        out.append(
            F.scaled_dot_product_attention(
                q[:, :, mine], k[:, :, seen], v[:, :, seen], attn_mask=mask.unsqueeze(1)
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2)


def attention_in_one_call(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, window: int | None, positions: Tensor | None
) -> Tensor:
    """`attention_in_window`, also without a window, by one call whose mask is the whole square. A compiled graph cannot have
    as many calls as there are segments or blocks, where their number varies.

    Args, returns: as there.
    """
    place = torch.arange(q.shape[1], device=q.device)
    mask = (ids[:, :, None] == ids[:, None]) & (place[:, None] >= place)
    if window is not None:
        where = place.unsqueeze(0) if positions is None else positions
        mask = mask & (where[:, :, None] - where[:, None] < window)
    q, k, v = _heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1)).transpose(1, 2)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, S, K] each; key heads are repeated, because with a mask torch's kernel without a square in memory needs as many
    of them as of queries."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
