"""Which losses count as bad."""

import json
import math

import pytest

from megadyn.config import TrainingConfig
from megadyn.training.loss_rule import LossRule


def test_a_spike_is_measured_against_the_median_of_a_full_window():
    rule = LossRule(TrainingConfig(spike_factor=2.0, spike_window=3))
    for step, loss in enumerate((1.0, 5.0), 1):
        rule.note(step, loss)
        assert rule.limit == math.inf
    rule.note(3, 2.0)
    assert rule.limit == 4.0  # twice the median of 1, 5, 2
    rule.note(4, 3.0)  # 5, 2, 3
    assert rule.limit == 6.0
    assert LossRule(TrainingConfig(spike_window=1)).limit == math.inf


def test_a_norm_is_measured_against_its_moving_average():
    rule = LossRule(TrainingConfig(norm_spike_factor=2.0, spike_window=4))
    norms, sums, weights = [1.0, 3.0, 2.0, 4.0, 1.5], 0.0, 0.0
    for step, norm in enumerate(norms, 1):
        assert (rule.norm_limit == math.inf) == (step <= 4)
        rule.note(step, 1.0, norm)
        sums, weights = sums * 0.75 + norm, weights * 0.75 + 1
    assert rule.norm_limit == pytest.approx(2 * sums / weights)
    other = LossRule(TrainingConfig(norm_spike_factor=2.0, spike_window=4))
    other.set_state(json.loads(json.dumps(rule.state())))
    assert other.norm_limit == rule.norm_limit
    other.note_bad(6, 1.0)
    assert other.norm_limit == rule.norm_limit, "a bad step's norm does not count"


def test_the_rule_goes_on_from_its_state_but_forgets_no_bad_step():
    rule = LossRule(TrainingConfig(spike_factor=2.0, spike_window=2))
    for step, loss in enumerate((1.0, 2.0, 3.0), 1):
        rule.note(step, loss)
    rule.bad_steps = 4
    other = LossRule(TrainingConfig(spike_factor=2.0, spike_window=2))
    other.set_state(json.loads(json.dumps(rule.state())))
    assert (other.limit, other.bad_steps) == (rule.limit, 4) == (5.0, 4)
    other.bad_steps = 6
    other.set_state(rule.state())
    assert other.bad_steps == 6
