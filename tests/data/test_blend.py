"""Blends: exact proportions at every prefix, the same draws however they are asked for."""

import heapq
from collections.abc import Iterator

import numpy as np
import pytest

from megadyn.data.blend import BLOCK, Blend, Schedule
from megadyn.data.samples import SampleSet


def random_weights(rng: np.random.Generator) -> np.ndarray:
    """Of 1 to 9 sets: equal ones, whole numbers, fractions, very small ones."""
    return rng.choice([1, 1, 2, 3, 0.1, 0.001, 7.7], rng.integers(1, 10)) * rng.choice([1, 1e-9, 1e12])


def naive_draws(weights: np.ndarray) -> Iterator[tuple[int, int]]:
    """(set, draw), one after the other: always the set whose next draw has the earliest time."""
    shares = weights / weights.sum()
    queue = [((0 + 0.5) / share, d, 0) for d, share in enumerate(shares)]
    heapq.heapify(queue)
    while True:
        _, d, draw = queue[0]
        yield d, draw
        heapq.heapreplace(queue, ((draw + 1 + 0.5) / shares[d], d, draw + 1))


@pytest.mark.parametrize("case", range(30))
def test_draws_equal_a_naive_loop_and_each_share_is_exact(case):
    rng = np.random.default_rng(case)
    weights, count = random_weights(rng), 2000
    schedule, want = Schedule(weights), naive_draws(weights)
    sets, draws = schedule.draws(0, count)
    assert list(zip(sets.tolist(), draws.tolist(), strict=True)) == [next(want) for _ in range(count)]

    share, D = weights / weights.sum(), len(weights)
    taken = np.cumsum(sets[:, None] == np.arange(D), axis=0)  # [n, D], after each sample
    ideal = np.arange(1, count + 1)[:, None] * share
    assert (np.abs(taken - ideal) <= 0.5 + share * D / 2 + 1e-9).all()

    for _ in range(20):
        first = int(rng.integers(count))
        part = schedule.draws(first, int(rng.integers(count - first + 1)))
        assert np.array_equal(part.sets, sets[first : first + len(part.sets)])
        assert np.array_equal(part.draws, draws[first : first + len(part.sets)])


def test_far_into_a_run_the_shares_still_hold_and_no_draw_is_missed_or_taken_twice():
    weights = np.array([0.5, 0.3, 0.2 - 1e-7, 1e-7])
    schedule, first = Schedule(weights), 10**12 + 7
    blocks = [schedule.draws(first + 1000 * i, 1000) for i in range(50)]
    sets, draws = (np.concatenate(column) for column in zip(*blocks, strict=True))
    for d in range(3):
        mine = draws[sets == d]
        assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))
        assert abs(mine[0] - first * weights[d]) <= 0.5 + weights[d] * 4 / 2 + 1


@pytest.mark.parametrize("case", range(50))
def test_supply_ends_where_the_first_set_has_none_left(case):
    rng = np.random.default_rng(case)
    weights = random_weights(rng)
    sizes = rng.integers(1, 40, len(weights))
    count, empty = Schedule(weights).supply(sizes)
    for s, (d, draw) in enumerate(naive_draws(weights)):
        if draw == sizes[d]:
            assert (s, d) == (count, empty)
            return


def test_a_blend_draws_each_set_in_its_own_order(write_dataset, monkeypatch):
    sets = [SampleSet(write_dataset([[40], [30]], name=f"d{d}"), sequence_length=4, seed=d) for d in range(3)]
    blend = Blend(sets, [1, 2, 5])
    want = [
        sets[d][draw].tolist()
        for (d, draw), _ in zip(naive_draws(np.array([1, 2, 5])), range(200), strict=False)
    ]
    assert blend.take(range(200)).tolist() == want
    assert blend.take([150, 3, 150]).tolist() == [want[150], want[3], want[150]]
    assert blend.take([BLOCK - 1, BLOCK, 3]).tolist() == [
        *(sets[d][draw].tolist() for d, draw in zip(*Schedule([1, 2, 5]).draws(BLOCK - 1, 2), strict=True)),
        want[3],
    ]
    assert blend.take([]).shape == (0, 5)
    assert len(blend) == Schedule([1, 2, 5]).supply([17, 17, 17])[0]
    with pytest.raises(IndexError):
        blend.take([3, -1])

    monkeypatch.setattr("megadyn.data.blend.BLOCK", 7)
    assert Blend(sets, [1, 2, 5]).take(range(200)).tolist() == want


def test_a_blend_repeats_no_sample_within_its_length_and_one_behind_it(write_dataset):
    sets = [SampleSet(write_dataset([[n]] * 2, name=f"d{n}"), sequence_length=4, seed=n) for n in (40, 90)]
    blend = Blend(sets, [1, 1])
    sets_drawn, draws = blend.schedule.draws(0, len(blend) + 1)
    assert (draws[:-1] < np.array([len(samples) for samples in sets])[sets_drawn[:-1]]).all()
    assert draws[-1] == len(sets[sets_drawn[-1]]) == 19
    assert blend.take([len(blend)]).tolist() == [sets[0][19].tolist()]  # the next epoch of the smaller set


def test_what_changes_the_order_changes_the_key(write_dataset):
    a, b = (SampleSet(write_dataset([[n]], name=f"d{n}"), sequence_length=4, seed=0) for n in (40, 90))
    keys = {
        Blend(sets, weights).key
        for sets, weights in [([a, b], [1, 2]), ([b, a], [1, 2]), ([a, b], [1, 3]), ([a], [1])]
    }
    assert len(keys) == 4
    assert Blend([a, b], [1, 2]).key == Blend([a, b], [10, 20]).key  # proportions


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [5, 1e-3]])
def test_counts_are_those_of_the_draws(weights):
    schedule = Schedule(weights)
    sets = schedule.draws(0, 500).sets
    for first in (0, 1, 2, 7, 100, 499):
        assert schedule.counts(first).tolist() == np.bincount(sets[:first], minlength=len(weights)).tolist()
