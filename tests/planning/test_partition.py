"""Pipeline stages of equal cost, against every way to cut."""

import random
from itertools import combinations, pairwise

import pytest

from megadyn.planning.partition import balanced_stages, stage_costs, stage_table


def dearest(layers: list[float], head: float, cuts: list[int]) -> float:
    costs = [sum(layers[a:b]) for a, b in pairwise(cuts)]
    costs[-1] += head
    return max(costs)


@pytest.mark.parametrize("seed", range(100))
def test_no_other_cut_has_a_cheaper_dearest_stage(seed):
    rng = random.Random(seed)
    layers = [rng.choice((rng.random(), rng.randint(1, 9))) for _ in range(rng.randint(1, 9))]
    head, stages = rng.choice((0.0, 1.0, 5.0, 30.0)), rng.randint(1, len(layers))
    cuts = balanced_stages(layers, head, stages)
    assert cuts[0] == 0
    assert cuts[-1] == len(layers)
    assert len(cuts) == stages + 1
    assert all(a < b for a, b in pairwise(cuts))
    every = [[0, *inner, len(layers)] for inner in combinations(range(1, len(layers)), stages - 1)]
    assert dearest(layers, head, cuts) == pytest.approx(min(dearest(layers, head, other) for other in every))


def test_a_dear_head_makes_the_last_stage_short():
    assert balanced_stages([1.0] * 8, 0.0, 2) == [0, 4, 8]
    assert balanced_stages([1.0] * 8, 4.0, 2) == [0, 6, 8]
    assert balanced_stages([1.0] * 8, 100.0, 2) == [0, 7, 8]


def test_cheap_skipping_layers_stand_closer_together():
    assert balanced_stages([2.0, 1.0] * 4, 0.0, 2) == [0, 4, 8]
    assert balanced_stages([4.0, 1.0, 1.0, 1.0, 1.0], 0.0, 2) == [0, 1, 5]


def test_the_table_shows_what_each_stage_holds_and_costs():
    cuts = balanced_stages([2.0, 1.0] * 4, 3.0, 2)
    assert stage_costs([2.0, 1.0] * 4, 3.0, cuts) == [8.0, 7.0]
    assert stage_table([2.0, 1.0] * 4, 3.0, cuts).splitlines() == [
        "stage  layers     share of FLOPs",
        "    0  0-4         53.3%  embedding",
        "    1  5-7         46.7%  head",
        "the most expensive stage costs 1.07 times the mean",
    ]
    assert stage_table([1.0], 1.0, [0, 1]).splitlines()[1] == "    0  0          100.0%  embedding, head"
