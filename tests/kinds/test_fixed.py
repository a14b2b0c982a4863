"""The control: choices by position are what README.md says, new in each step, and the same under every layout."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megadyn.costs.shape import capacity_count
from megadyn.errors import ConfigError
from megadyn.kinds import make_kind
from megadyn.kinds.fixed.layers import FixedLayer, hashed, stride_score
from megadyn.model.block import Stream
from megadyn.routing.layer import LossScale
from megadyn.routing.select import as_mask
from tests.helpers.networks import layer_context
from tests.helpers.tiny import tiny_config

HIDDEN = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(first_sample: int = 0, index: int = 1, kind: str = "fixed") -> FixedLayer:
    return FixedLayer(
        replace(layer_context(tiny_config(kind)), first_sample=first_sample), index, LossScale()
    )


def chosen(fixed: FixedLayer, hidden: Tensor) -> Tensor:
    """[B, T], of one micro-batch."""
    mask = as_mask(fixed.choose(Stream(hidden)), hidden.shape[:2])
    fixed(Stream(hidden))
    return mask


def test_the_hash_is_the_one_written_down_and_uniform():
    def by_hand(*parts: int) -> float:
        x = 0
        for part in parts:
            x = ((x ^ part) + 0x9E3779B9) % 2**32
            x = (x ^ x >> 16) * 0x45D9F3B % 2**32
            x = (x ^ x >> 16) * 0x45D9F3B % 2**32
            x ^= x >> 16
        return x / 2**32

    tokens = torch.arange(20_000)
    found = hashed(2**32 - 1, 5, 7, torch.arange(2).unsqueeze(1), tokens)
    assert found[1, 19_999].item() == by_hand(2**32 - 1, 5, 7, 1, 19_999)
    counts = torch.histc(found, 20, 0, 1)
    assert ((counts - 2000).abs() < 5 * math.sqrt(2000)).all()
    assert abs(torch.corrcoef(found)[0, 1]) < 0.03, "samples are independent"
    assert abs(torch.corrcoef(torch.stack([found[0, 1:], found[0, :-1]]))[0, 1]) < 0.03, (
        "and so are neighbours"
    )


def test_each_step_layer_and_sample_has_a_choice_of_its_own_of_exactly_k_tokens():
    fixed = layer()
    first = chosen(fixed, HIDDEN)
    fixed.count.take_step_mean()
    fixed.count.end_step(torch.zeros(()), None)
    choices = [*first, *chosen(fixed, HIDDEN), *chosen(layer(index=3), HIDDEN)]
    assert all(choice.sum() == capacity_count(0.3, 24) for choice in choices)
    assert len({tuple(choice.tolist()) for choice in choices}) == len(choices)


def test_it_does_not_depend_on_micro_batches_or_ranks():
    whole, by_one, second_rank = chosen(layer(), HIDDEN), layer(), layer(first_sample=2)
    assert torch.equal(torch.cat([chosen(by_one, row) for row in HIDDEN.split(1)]), whole)
    assert torch.equal(chosen(second_rank, HIDDEN[2:]), whole[2:])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["topk", "causal"])
def test_outside_training_it_is_the_same_in_all_sequences_and_at_all_times(mode):
    fixed = layer()
    fixed.causal_router.mode = mode
    first = chosen(fixed, HIDDEN)
    fixed.count.steps = 9
    assert torch.equal(chosen(fixed, HIDDEN), first)
    assert all(torch.equal(row, first[0]) for row in first)
    assert 0 < first[0].sum() < 24


def test_the_count_of_steps_is_saved():
    fixed, resumed = layer(), layer()
    fixed.count.steps = 4
    resumed.trackers()["steps"].set_state(fixed.trackers()["steps"].state(), torch.device("cpu"))
    assert torch.equal(chosen(resumed, HIDDEN), chosen(fixed, HIDDEN))
    assert not torch.equal(chosen(layer(), HIDDEN), chosen(fixed, HIDDEN))


@pytest.mark.parametrize("capacity", [0.1, 0.125, 0.3, 0.7, 1 / 3, 0.99, 1.0])
def test_a_stride_takes_floor_of_c_t_evenly_spread(capacity):
    chosen = stride_score(capacity, torch.arange(1000)) > 0
    for length in range(1, 1000):
        assert chosen[:length].sum() == int(capacity * length)
    gaps = chosen.nonzero().flatten().diff()
    assert gaps.max() - gaps.min() <= 1


@torch.no_grad()
def test_topk_and_causal_rule_take_the_same_positions_of_a_stride():
    fixed = layer(kind="fixed-stride")
    topk = chosen(fixed, HIDDEN)
    fixed.causal_router.mode = "causal"
    assert torch.equal(chosen(fixed, HIDDEN), topk)


def test_keys_of_a_learned_choice_are_refused():
    for key, value in (
        ("causal", "threshold"),
        ("threshold_momentum", 0.9),
        ("seed", 2**32),
        ("score", "even"),
    ):
        with pytest.raises(ConfigError):
            make_kind("fixed", **{key: value})
