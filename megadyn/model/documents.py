"""Documents packed into one sample: attention, positions and averages that never cross a border."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Runs of tokens that attention must not leave, one behind the other in the flattened batch."""

    ids: Tensor
    """The run that each token belongs to; int64, rising. A part of the tokens may leave some runs empty."""
    runs: int
    """How many there are: ids are below."""

    def ends(self) -> Tensor:
        """Where each run ends, as the running lengths [runs + 1] int32 that variable-length attention takes."""
        return torch.searchsorted(self.ids.flatten(), torch.arange(self.runs + 1, device=self.ids.device), out_int32=True)


class Documents(NamedTuple):
    """Which document each token belongs to, and where in it it stands."""

    segments: Segments
    """ids [B, T]; each sample begins a document."""
    positions: Tensor
    """[B, T] int64, from the start of the document."""


def documents_of(tokens: Tensor, eod: int) -> Documents:
    """tokens [B, T]: a document ends with its `eod`, the token behind it begins the next."""
    ends = (tokens == eod).long()
    return from_ids(ends.cumsum(dim=1) - ends)


def from_ids(ids: Tensor) -> Documents:
    """ids [B, T] that change where a document ends. Waits for the device once, for the number of documents."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    start = torch.where(begins, place, 0).cummax(dim=1).values
    numbers = begins.flatten().cumsum(dim=0) - 1
    return Documents(Segments(numbers.view_as(ids), int(numbers[-1]) + 1), place - start)
