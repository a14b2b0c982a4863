"""Documents packed into one sample: attention, positions and averages never cross a border."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Runs of tokens that limit attention, one after another in the flattened batch."""

    ids: Tensor
    """The run that each token belongs to; int64, ascending."""
    ends: Tensor
    """Cumulative lengths [runs + 1] int32, as variable-length attention takes them."""
    longest: int
    """Upper bound on the length of a run, known without asking the device; kernels are laid out for it."""


def segments_of(ids: Tensor, runs: int, longest: int) -> Segments:
    """`ids` are below `runs`; some runs may be empty."""
    ends = torch.searchsorted(ids.flatten(), torch.arange(runs + 1, device=ids.device), out_int32=True)
    return Segments(ids, ends, longest)


class Documents(NamedTuple):
    """The document of each token, and its position in the document."""

    segments: Segments
    """ids [B, T]; each sample begins a document."""
    positions: Tensor
    """[B, T] int64, from the start of the document."""


def documents_of(tokens: Tensor, eod: int) -> Documents:
    """tokens [B, T]: a document ends with its `eod`; the token after it begins the next one."""
    ends = (tokens == eod).long()
    return from_ids(ends.cumsum(dim=1) - ends)


def from_ids(ids: Tensor) -> Documents:
    """ids [B, T] change where a document ends. Waits for the device once, for the number of documents."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    start = torch.where(begins, place, 0).cummax(dim=1).values
    numbers = begins.flatten().cumsum(dim=0) - 1
    return Documents(segments_of(numbers.view_as(ids), int(numbers[-1]) + 1, ids.shape[1]), place - start)
