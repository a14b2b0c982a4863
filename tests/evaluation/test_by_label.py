"""Counting by label, on numbers that can be checked by hand. `tests/examples/test_probe.py` measures models."""

import numpy as np
import pytest

from megadyn.evaluation.by_label import Passed, area_under_curve, by_group, by_layer


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(1)
    score, positive = rng.integers(0, 9, 60).astype(np.float32), rng.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    assert area_under_curve(score, positive) == pytest.approx(np.mean(pairs))
    assert area_under_curve(-score, positive) == pytest.approx(1 - np.mean(pairs))


def test_an_area_needs_both_sides_and_numbers() -> None:
    score = np.arange(4.0)
    assert area_under_curve(score, score > 1) == 1.0
    assert area_under_curve(np.ones(4), score > 1) == 0.5
    assert area_under_curve(score, score > 9) is None
    assert area_under_curve(score, score < 9) is None
    assert area_under_curve(np.array([0, 1, np.nan, 3]), score > 1) is None


def test_groups_and_layers_are_means_over_their_tokens() -> None:
    passed = Passed(
        tokens=np.arange(6),
        classes=np.array([0, 0, 1, 1, 1, 0], np.uint8),
        hops=np.array([0, 0, 2, 2, 1, 0], np.uint8),
        loss=np.array([1, 2, 3, 5, 7, 3], np.float32),
        within=np.array([1, 2, 3, 5, 6, 3], np.float32),
        right=np.array([1, 0, 1, 1, 0, 0], bool),
        chosen={2: np.array([0, 0, 1, 0, 1, 0], bool), 3: np.ones(6, bool)},
        score={2: np.array([0, 5, 4, 3, 6, 1], np.float32)},
    )
    assert by_group(passed, ("text", "answer")) == [
        {
            "class": "text",
            "hops": 0,
            "tokens": 3,
            "loss": 2.0,
            "within": 2.0,
            "accuracy": pytest.approx(1 / 3),
            "chosen": {"2": 0.0, "3": 1.0},
        },
        {
            "class": "answer",
            "hops": 1,
            "tokens": 1,
            "loss": 7.0,
            "within": 6.0,
            "accuracy": 0.0,
            "chosen": {"2": 1.0, "3": 1.0},
        },
        {
            "class": "answer",
            "hops": 2,
            "tokens": 2,
            "loss": 4.0,
            "within": 4.0,
            "accuracy": 1.0,
            "chosen": {"2": 0.5, "3": 1.0},
        },
    ]
    assert by_layer(passed) == {
        "2": {"share": pytest.approx(1 / 3), "area": pytest.approx(7 / 9)},
        "3": {"share": 1.0, "area": None},
    }
