"""Where the choices of a layer pass in training, so that they can be recorded, or give way to recorded ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from megadyn.errors import UserError
from megadyn.routing.select import Selection, as_mask


class Choices(NamedTuple):
    """What a layer chose of B sequences, and by which score: chosen tokens lie at or above the cut, the others at or below it."""

    chosen: Tensor
    """[B, T], true for tokens taken; [B, T, n] where n things are chosen for each token."""
    score: Tensor
    """Shaped as `chosen`, in float32."""
    cut: Tensor
    """[B] or [B, n], in float32."""


class Tape:
    """A layer's choices in one step, for the samples of this rank in their order."""

    def __init__(self, samples: int, given: Tensor | None = None, source: str = "", *, keeps: bool = False):
        """`given`: what takes the place of the layer's choices, [samples, T], read from `source`. `keeps`: collects its own."""
        self.samples, self.given, self.source, self.keeps = samples, given, source, keeps
        self.passed = 0
        """Samples whose choice was settled, so far."""
        self.kept: list[Choices] = []

    def settle(self, chosen: Tensor, score: Tensor, cut: Tensor | float | None) -> Tensor:
        first, self.passed = self.passed, self.passed + len(chosen)
        if self.passed > self.samples:  # the layer's fault; whoever ends the step tells
            return chosen
        if self.keeps:
            self.kept.append(
                Choices(chosen, score.detach().float(), cut_of(chosen, score.detach().float(), cut))
            )
        if self.given is None:
            return chosen
        given = self.given[first : self.passed].to(chosen.device)
        if given.shape != chosen.shape:
            raise UserError(
                f"{self.source}: holds choices {list(given.shape[1:])} for each sample, and the layer makes "
                f"{list(chosen.shape[1:])}"
            )
        return given

    def whole(self) -> Choices:
        """The kept choices of all micro-batches."""
        return Choices(*(torch.cat(parts) for parts in zip(*self.kept, strict=True)))


class Decisions:
    """The one place through which all choices of a layer pass, by `settle`, or by `settle_top` for top-k.

    Whatever the layer computes from a choice (gates, losses, statistics, averages over steps) follows from what these return.
    They are called outside of what is recomputed. Without a tape they return what they are given.
    """

    def __init__(self) -> None:
        self.tape: Tape | None = None
        """Of the training step at hand, if its choices are recorded or replayed."""

    def settle(self, chosen: Tensor, score: Tensor, cut: Tensor | float | None = None) -> Tensor:
        """The mask that counts, for the layer's own mask `chosen` [B, T] or [B, T, n].

        Args:
            score: what it follows from, of the same shape, equal on all tensor ranks.
            cut: what a score must reach; None for the lowest score that was taken.
        """
        return chosen if self.tape is None else self.tape.settle(chosen, score, cut)

    def settle_top(self, top: Selection, score: Tensor) -> Selection:
        """The same for the `top` of score [B, T]."""
        if self.tape is None:
            return top
        mask = self.settle(as_mask(top, score.shape), score)
        count = top.places.shape[1]
        if not bool((mask.sum(dim=1) == count).all()):
            raise UserError(
                f"{self.tape.source}: must take {count} tokens of each sequence, as the layer does"
            )
        return Selection(mask.flatten().nonzero().view(len(mask), count))


def cut_of(chosen: Tensor, score: Tensor, cut: Tensor | float | None) -> Tensor:
    """[B] or [B, n]: `cut`, moved between the lowest score taken and the highest one left where a guard took other tokens."""
    lowest = score.masked_fill(~chosen, torch.inf).amin(dim=1)
    if cut is None:
        return lowest
    highest_left = score.masked_fill(chosen, -torch.inf).amax(dim=1)
    return torch.as_tensor(cut, dtype=score.dtype, device=score.device).maximum(highest_left).minimum(lowest)
