"""Choose tokens, take them out of their sequences, put their updates back."""

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """Tokens chosen from each sequence, in sequence order."""

    positions: Tensor
    """[B, C] places in the sequence; the chosen ones first, rising."""
    valid: Tensor | None
    """[B, C] false for padding behind the chosen tokens of a sequence; None when every entry is chosen."""


def choose_top(score: Tensor, count: int) -> Selection:
    """The `count` highest of score [B, T] in each sequence; of equal scores the first."""
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return Selection(best.sort(dim=1).values, None)


def choose_where(mask: Tensor) -> Selection:
    """The tokens where mask [B, T] is true, each sequence padded to the longest (reads the mask on the host).

    Padding stands behind the chosen tokens, so plain causal attention never shows it to them.
    """
    count = mask.sum(dim=1)
    longest = max(1, int(count.max()))
    index = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices[:, :longest]
    valid = torch.arange(longest, device=mask.device) < count.unsqueeze(1)
    return Selection(index, valid)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T] or [B, T, D] at index [B, C] -> [B, C] or [B, C, D]."""
    return x.flatten(0, 1).index_select(0, _flat(x, index)).unflatten(0, index.shape)


def put_back(x: Tensor, index: Tensor, update: Tensor) -> Tensor:
    """A copy of x [B, T, D] with update [B, C, D] added at index [B, C]."""
    return x.flatten(0, 1).index_add(0, _flat(x, index), update.flatten(0, 1)).view_as(x)


def replace(x: Tensor, index: Tensor, rows: Tensor, valid: Tensor | None) -> Tensor:
    """A copy of x [B, T, D] with rows [B, C, D] in place of those at index [B, C]; where `valid` is false x stays."""
    if valid is not None:
        rows = torch.where(valid.unsqueeze(-1), rows, take(x, index))
    return x.flatten(0, 1).index_copy(0, _flat(x, index), rows.flatten(0, 1)).view_as(x)


def as_mask(selection: Selection, length: int) -> Tensor:
    """[B, T], true at the chosen tokens."""
    chosen = torch.ones_like(selection.positions, dtype=torch.bool) if selection.valid is None else selection.valid
    return torch.zeros(selection.positions.shape[0], length, dtype=torch.bool, device=chosen.device).scatter(
        1, selection.positions, chosen)


def _flat(x: Tensor, index: Tensor) -> Tensor:
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return (index + rows).flatten()
