"""Training by the threshold: where it settles, what it takes, and that evaluation has one rule."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megadyn.errors import ConfigError
from megadyn.kinds import make_kind
from megadyn.network import routed_layers, set_routing_mode, thresholds_of
from megadyn.routing.choice import CausalRouter
from megadyn.routing.quantile import QuantileThreshold, guarded
from megadyn.routing.select import as_mask
from tests.helpers.networks import end_step, layer_context, make_network, with_routing
from tests.helpers.tiny import tiny_config, tiny_tokens

SAMPLES = tiny_tokens(1)[0]
TOKENS, LABELS = SAMPLES[:, :-1], SAMPLES[:, 1:]
HIDDEN = torch.zeros(1, 1, 32)


def scores(seed: int, batch: int = 16) -> Tensor:
    """Skewed, with a level of its own in each sequence, so that a mean of sequences' quantiles is not the batch's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 64, generator=generator).exp() + 2 * torch.randn(batch, 1, generator=generator)


def router(**routing: object) -> CausalRouter:
    config = with_routing(tiny_config("mod-threshold"), **routing)
    return CausalRouter("model.layers.1.causal_router", layer_context(config))


def step(chooser: CausalRouter, score: Tensor, micro_batch: int = 16) -> None:
    for part in score.split(micro_batch):
        chooser(part, HIDDEN)
    chooser.threshold.end_step(chooser.threshold.take_step_mean())


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_it_settles_where_the_share_of_all_tokens_is_the_capacity(capacity, scale):
    """Of the population, from a start that is far off for scores such as these."""
    chooser = router(
        capacity=capacity, threshold_momentum=0.9, threshold_start=1, safe_min=None, safe_max=None
    )
    for i in range(150):
        step(chooser, scale * scores(i))
    share = (
        (torch.cat([scale * scores(1000 + i) for i in range(50)]) >= chooser.threshold.value).float().mean()
    )
    assert share == pytest.approx(capacity, abs=0.04)


def test_it_does_not_depend_on_the_split_into_micro_batches():
    whole, split = (router(threshold_start=2) for _ in range(2))
    for i in range(5):
        step(whole, scores(i))
        step(split, scores(i), micro_batch=2)
        assert_close(split.threshold.value, whole.threshold.value, rtol=1e-6, atol=0)


def test_before_its_start_training_goes_by_top_k_and_afterwards_by_the_threshold():
    chooser = router(threshold_start=2, safe_min=0.0, safe_max=1.0)
    for i in range(2):
        mask = as_mask(chooser(scores(i), HIDDEN).selection, torch.Size([16, 64]))
        assert (mask.sum(dim=1) == int(0.3 * 64)).all()
        chooser.threshold.end_step(chooser.threshold.take_step_mean())
    for mode in ("topk", "causal"):
        chooser.mode = mode
        found, want = chooser(scores(5), HIDDEN), scores(5) >= chooser.threshold.value
        assert torch.equal(as_mask(found.selection, want.shape), want)
        assert torch.equal(found.in_top, want)
        assert found.statistics["causal_agreement"] == 1


def test_a_step_is_the_formula():
    threshold = QuantileThreshold(0.9, 0.25, 0)
    threshold.average, threshold.steps = torch.tensor(0.5 * (1 - 0.9**3)), 3
    score = torch.tensor([[0.0, 0.4, 0.6, 1.0]])
    threshold.watch(score, None)
    threshold.end_step(threshold.take_step_mean())
    assert threshold.value.item() == pytest.approx(0.5 + 0.1 * 4 * 0.3 * (0.5 - 0.25))
    assert threshold.steps == 4


def test_guards_keep_the_best_of_each_sequence():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.1, 0.2, 0.4, 0.3], [4.0, 0.0, 0.0, 3.0]])
    found = guarded(score >= 1, score, 0.3, 0.75)
    assert found.tolist() == [
        [True, False, True, True],
        [False, False, True, True],
        [True, False, False, True],
    ]
    assert not guarded(score >= 9, score, 0.0, 1.0).any()


def test_evaluation_has_one_rule_without_guards_and_trains_with_them():
    network = make_network(tiny_config("mod-threshold"))
    for _ in range(2):
        network(TOKENS, LABELS)
        end_step(network)
    for threshold in thresholds_of(routed_layers(network)).values():
        threshold.average = threshold.average + 100.0  # nothing reaches it
    losses = []
    with torch.no_grad():
        for mode in ("topk", "causal"):
            set_routing_mode(routed_layers(network), mode)
            losses.append(network(TOKENS, LABELS).item())
    assert losses[0] == losses[1]
    for layer in routed_layers(network):
        layer.monitor.read()
    set_routing_mode(routed_layers(network), "topk")
    network(TOKENS, LABELS)
    assert [
        layer.monitor.read()["routed_fraction"].item() for layer in routed_layers(network)
    ] == pytest.approx([4 / 24] * 2)


def test_what_makes_no_sense_is_refused():
    for keys in (
        {"kind": "mod", "choose": "threshold", "causal": "bce"},
        {"kind": "mod", "safe_max": 0.5},
        {"kind": "dtrnet", "choose": "threshold"},
        {"kind": "dtf", "choose": "threshold", "safe_min": 0.6},
        {"kind": "fixed", "choose": "threshold"},
        {"kind": "dtf", "choose": "best"},
    ):
        with pytest.raises(ConfigError):
            make_kind(**keys)
    assert make_kind("mod", choose="threshold", capacity=0.25).guards == (0.125, 0.5)
