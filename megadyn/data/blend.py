"""Draws from several sets of samples in fixed proportions.

The weights w of D sets sum to 1. Draw j of set d has the time (j + 1/2) / w_d. The samples of the run are all draws in
order of time; ties are ordered by set. By time t, set d was drawn round(w_d t) times, and all sets together t times to
within D / 2. So among the first n samples, set d has its share w_d n to within 1/2 + w_d D / 2, for every n. Which draw
a sample is depends only on its number and the weights, not on the length of the run or the number of ranks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megadyn.data.samples import Indices, Samples, content_key

BLOCK = 2**18
"""Number of samples whose draws are computed at once."""


class Draws(NamedTuple):
    """For each of n samples: its set, and its number within that set."""

    sets: NDArray[np.intp]  # [n]
    draws: Indices  # [n]


class Schedule:
    """Maps samples to draws."""

    def __init__(self, weights: ArrayLike) -> None:
        """`weights` [D], all above 0; they need not sum to 1."""
        given = np.asarray(weights, np.float64)
        self.weights: NDArray[np.float64] = given / given.sum()

    def draws(self, first: int, count: int) -> Draws:
        """The draws of samples `first` to `first + count` - 1."""
        begins, near, order = self._near(first, count)
        mine = order[first - int(begins.sum()) :][:count]
        return Draws(near.sets[mine], near.draws[mine])

    def counts(self, first: int) -> Indices:
        """How often each set was drawn for samples 0 to `first` - 1 [D]."""
        begins, near, order = self._near(first, 0)
        before = near.sets[order[: first - int(begins.sum())]]
        return begins + np.bincount(before, minlength=len(begins))

    def _near(self, first: int, count: int) -> tuple[Indices, Draws, NDArray[np.intp]]:
        """Draws that include those of samples `first` to `first + count`: the first of each set [D], all of them, and their order
        in time."""
        # Sample n is drawn at time n to within D / 2; the additional 2 covers rounding.
        margin = len(self.weights) / 2 + 2
        begins = np.maximum(0, np.floor(self.weights * (first - margin))).astype(np.int64)
        ends = np.ceil(self.weights * (first + count + margin)).astype(np.int64) + 1
        draws = np.concatenate(
            [np.arange(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        )
        sets = np.repeat(np.arange(len(begins)), ends - begins)
        return begins, Draws(sets, draws), np.argsort(self.time(sets, draws), kind="stable")

    def time(self, sets: NDArray[Any], draws: NDArray[Any]) -> NDArray[np.float64]:
        times: NDArray[np.float64] = (draws + 0.5) / self.weights[sets]
        return times

    def supply(self, sizes: ArrayLike) -> tuple[int, int]:
        """(number of samples until a set of these `sizes` [D] runs out, index of that set)."""
        every = np.arange(len(self.weights))
        times = self.time(every, np.asarray(sizes, np.int64))  # of the first draw that a set cannot supply
        empty = int(times.argmin())
        # Draws near that time are compared one by one, in the same order as in `draws`.
        near = np.maximum(0, np.floor(self.weights * times[empty]).astype(np.int64) - 2)[:, None] + np.arange(
            5
        )
        when = self.time(every[:, None], near)
        before = (when < times[empty]) | ((when == times[empty]) & (every[:, None] < empty))
        return int(near[:, 0].sum() + before.sum()), empty


class Blend:
    """Samples from several sets, each in its own order and in proportion to its weight."""

    def __init__(self, sets: Sequence[Samples], weights: ArrayLike) -> None:
        self.sets, self.schedule = sets, Schedule(weights)
        self.sequence_length = sets[0].sequence_length
        self.key = content_key(*(samples.key for samples in sets), self.schedule.weights)
        self._block = lru_cache(maxsize=2)(lambda number: self.schedule.draws(number * BLOCK, BLOCK))

    def __len__(self) -> int:
        """Number of samples before any of them repeats."""
        return self.schedule.supply([len(samples) for samples in self.sets])[0]

    def take(self, ids: Sequence[int] | Indices) -> Indices:
        """Tokens [B, L + 1] of the samples `ids` [B], counted from the start of the run."""
        wanted = np.asarray(ids, np.int64)
        if wanted.size and wanted.min() < 0:
            raise IndexError(f"sample {wanted.min()}")
        sets, draws = np.empty(len(wanted), np.intp), np.empty(len(wanted), np.int64)
        for number in set((wanted // BLOCK).tolist()):
            here, block = wanted // BLOCK == number, self._block(number)
            sets[here], draws[here] = (column[wanted[here] - number * BLOCK] for column in block)
        rows = np.empty((len(wanted), self.sequence_length + 1), np.int64)
        for d in set(sets.tolist()):
            rows[sets == d] = self.sets[d].take(draws[sets == d])
        return rows
