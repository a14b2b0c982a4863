"""Documents packed into one sample: attention, positions and averages that never cross a border."""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Which document of its sample each token belongs to, and where in it it stands; [B, S] int64 each."""

    ids: Tensor
    """0, 1, ... along the sample."""
    positions: Tensor
    """From the start of the document."""


def documents_of(tokens: Tensor, eod: int) -> Documents:
    """tokens [B, T]: a document ends with its `eod`, the token behind it begins the next."""
    ends = (tokens == eod).long()
    return from_ids(ends.cumsum(dim=1) - ends)


def from_ids(ids: Tensor) -> Documents:
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.where(begins, place, 0).cummax(dim=1).values
    return Documents(ids, place - start)


def attention_mask(ids: Tensor) -> Tensor:
    """[B, 1, S, S], true where a token may see another: itself and what stands before it in its document."""
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    return same.tril().unsqueeze(1)


def segment_ends(ids: Tensor) -> Tensor:
    """Where documents end in the flattened [B * S] tokens, as the running lengths [n + 1] int32 that variable-length
    attention takes; every sample begins a new one."""
    ends = torch.ones_like(ids, dtype=torch.bool)
    ends[:, :-1] = ids[:, 1:] != ids[:, :-1]
    found = ends.flatten().nonzero().flatten() + 1
    return torch.cat([found.new_zeros(1), found]).to(torch.int32)
