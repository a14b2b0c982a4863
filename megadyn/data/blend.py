"""Several sets of samples drawn from in fixed proportions.

The weights w of D sets sum to 1. Draw j of set d has the time (j + 1/2) / w_d; the samples of the run are all draws in the
order of their times, equal ones in the order of the sets. By time t set d was drawn round(w_d t) times, and all together
t times to within D / 2. So among the first n samples set d has its share w_d n to within 1/2 + w_d D / 2, for every n, and
which draw a sample is follows from its number and the weights: neither from the length of the run nor from its ranks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megadyn.data.samples import Indices, Samples, content_key

BLOCK = 2**18
"""Samples whose draws are worked out at once."""


class Draws(NamedTuple):
    """Of each of n samples: the set that it is from, and which of that set's samples it is."""

    sets: NDArray[np.intp]  # [n]
    draws: Indices  # [n]


class Schedule:
    """Which draw each sample is."""

    def __init__(self, weights: ArrayLike) -> None:
        """`weights` [D], all above 0, of any sum."""
        given = np.asarray(weights, np.float64)
        self.weights: NDArray[np.float64] = given / given.sum()

    def draws(self, first: int, count: int) -> Draws:
        """Of samples `first` to `first + count` - 1."""
        # sample n is drawn at time n to within D / 2; the rest is for rounding
        margin = len(self.weights) / 2 + 2
        begins = np.maximum(0, np.floor(self.weights * (first - margin))).astype(np.int64)
        ends = np.ceil(self.weights * (first + count + margin)).astype(np.int64) + 1
        draws = np.concatenate(
            [np.arange(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        )
        sets = np.repeat(np.arange(len(begins)), ends - begins)
        order = np.argsort(self.time(sets, draws), kind="stable")
        mine = order[first - int(begins.sum()) :][:count]
        return Draws(sets[mine], draws[mine])

    def time(self, sets: NDArray[Any], draws: NDArray[Any]) -> NDArray[np.float64]:
        times: NDArray[np.float64] = (draws + 0.5) / self.weights[sets]
        return times

    def supply(self, sizes: ArrayLike) -> tuple[int, int]:
        """(samples until a set of these `sizes` [D] has none left, which set that is)."""
        every = np.arange(len(self.weights))
        times = self.time(every, np.asarray(sizes, np.int64))  # of the first draw that is not there
        empty = int(times.argmin())
        # Draws near that time are compared one by one, in the order of `draws`.
        near = np.maximum(0, np.floor(self.weights * times[empty]).astype(np.int64) - 2)[:, None] + np.arange(
            5
        )
        when = self.time(every[:, None], near)
        before = (when < times[empty]) | ((when == times[empty]) & (every[:, None] < empty))
        return int(near[:, 0].sum() + before.sum()), empty


class Blend:
    """Samples of several sets, each drawn in its own order and in proportion to its weight."""

    def __init__(self, sets: Sequence[Samples], weights: ArrayLike) -> None:
        self.sets, self.schedule = sets, Schedule(weights)
        self.sequence_length = sets[0].sequence_length
        self.key = content_key(*(samples.key for samples in sets), self.schedule.weights)
        self._block = lru_cache(maxsize=2)(lambda number: self.schedule.draws(number * BLOCK, BLOCK))

    def __len__(self) -> int:
        """Samples before any of them comes again."""
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
