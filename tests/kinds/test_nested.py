"""Dynamic Nested Depth against its formulas: one layer as a loop over tokens, and a threshold that follows a share."""

import pytest
import torch
from torch.testing import assert_close

from megadyn.kinds.nested.layers import FollowingThreshold, logit
from megadyn.model.block import Stream
from megadyn.network import routed_layers, thresholds_of
from megadyn.parallel.grid import Axis
from megadyn.routing.select import choose_where, shared_out
from tests.helpers.naive import NaiveLayer
from tests.helpers.networks import disturb, end_step, make_layer, make_network, param_maker
from tests.helpers.tiny import tiny_config, tiny_tokens

T = 9


def layer_and_loop(norm: str, tau: float):
    config = tiny_config("nested", normalization=norm, hidden_size=16, ffn_size=24)
    layer = disturb(make_layer(config, 3), param_maker(config))
    layer.threshold.average = torch.tensor(tau)
    return layer, NaiveLayer(layer, config.model)


@pytest.mark.parametrize("norm", ["pre", "lns", "hybridnorm"])
def test_a_layer_is_its_formula_with_all_gradients(norm):
    layer, naive = layer_and_loop(norm, 0.5)
    h = torch.randn(
        2, T, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    rows = []
    for row in h:
        once = row + torch.stack(list(naive.block(row, range(T)).values()))
        p = torch.sigmoid(once @ naive.params["router.weight"][0])
        twice = [t for t in range(T) if p[t] >= 0.5]
        assert 0 < len(twice) < T, "the threshold must part the tokens, or the test shows nothing"
        rows.append(naive.nested(once, twice, p))
    want, found = torch.stack(rows), layer(Stream(h)).hidden
    assert_close(found, want)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    params = [h, *layer.parameters()]
    for mine, reference in zip(
        torch.autograd.grad(found, params, grad), torch.autograd.grad(want, params, grad), strict=True
    ):
        assert_close(mine, reference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["pre", "hybridnorm"])
def test_a_threshold_that_no_token_reaches_leaves_the_dense_layer(norm):
    layer, _ = layer_and_loop(norm, 2.0)
    h = torch.randn(2, T, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = layer(Stream(h)).hidden
    assert_close(out, layer.dense(h))
    out.sum().backward()
    assert not layer.router.weight.grad.any()


def end_of_step(threshold: FollowingThreshold) -> None:
    threshold.end_step(threshold.take_step_mean())


def test_the_threshold_moves_by_a_part_of_its_distance_from_the_share():
    threshold = FollowingThreshold(start=0.5, rate=0.1, share=0.2)
    score = torch.tensor([[0.0, 1.0, 2.0, -3.0]], dtype=torch.float64).sigmoid()
    threshold.watch_reached(score, score >= 0.5)  # three of four, at a mean distance of 6 / 4
    end_of_step(threshold)
    assert logit(threshold.average).item() == pytest.approx(0.1 * 4 * 1.5 * (0.75 - 0.2))
    again = FollowingThreshold(start=0.9, rate=0.1, share=0.2)
    again.set_state(threshold.state(), torch.device("cpu"))
    for other in (threshold, again):  # goes on alike
        other.watch_reached(score, score >= other.value)
        end_of_step(other)
    assert again.state() == threshold.state()
    assert again.average.dtype == torch.float64


def test_the_threshold_does_not_depend_on_how_a_step_is_split():
    score = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).sigmoid()
    found = []
    for parts in (1, 2, 8):
        threshold = FollowingThreshold(start=0.4, rate=0.1, share=0.2)
        for part in score.chunk(parts):
            threshold.watch_reached(part, part >= threshold.value)
        end_of_step(threshold)
        found.append(float(threshold.average))
    assert found == [pytest.approx(found[0], abs=1e-12)] * 3


@pytest.mark.parametrize("average", [-0.01, 0.0, 1.0, 1.01])
def test_a_saved_threshold_outside_of_all_scores_starts_anew(average: float):
    threshold = FollowingThreshold(start=0.3, rate=0.1, share=0.2)
    threshold.set_state({"average": average, "steps": 7}, torch.device("cpu"))
    assert threshold.state() == {"average": 0.3, "steps": 7}


def test_a_rate_of_0_holds_the_threshold():
    threshold = FollowingThreshold(start=0.3, rate=0.0, share=0.2)
    threshold.watch_reached(torch.ones(1, 4), torch.ones(1, 4).bool())
    end_of_step(threshold)
    assert float(threshold.average) == 0.3


@pytest.mark.parametrize("centre", [0.0, -40.0, -12.0, 12.0])
def test_the_share_is_kept_where_scores_are_saturated(centre: float):
    """Scores near 0 or 1, of which a few are at the other end, move with every step."""
    threshold = FollowingThreshold(start=0.5, rate=0.02, share=0.3)
    generator = torch.Generator().manual_seed(1)
    shares = []
    for step in range(600):
        logits = min(step / 300, 1) * centre + torch.randn(4, 64, generator=generator)
        logits[:, :4] = -centre
        score = logits.sigmoid()
        taken = score >= threshold.value
        threshold.watch_reached(score, taken)
        end_of_step(threshold)
        shares.append(float(taken.float().mean()))
    assert sum(shares[-100:]) / 100 == pytest.approx(0.3, abs=0.02)
    assert min(shares[-100:]) > 0.15 and max(shares[-100:]) < 0.45


def test_the_share_taken_comes_to_the_capacity():
    network = make_network(tiny_config("nested"), dtype=torch.float32)
    layers = routed_layers(network)
    assert set(thresholds_of(layers)) == {1, 3}, "exports and evaluation find it there"
    for samples in tiny_tokens(150):
        network(samples[:, :-1])  # weights stay: only the thresholds move
        end_step(network)
        if layers[0].threshold.steps == 100:
            for layer in layers:
                layer.monitor.read()
    for layer in layers:
        assert float(layer.monitor.read()["routed_fraction"]) == pytest.approx(0.3, abs=0.03)


def test_chosen_tokens_are_filled_up_to_equal_parts():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    (places, sequences), extra = shared_out(choose_where(mask), Axis("tp", 0, 4))
    assert places.tolist() == [[0, 2, 6, 7, 9, 9, 9, 9]]
    assert sequences.tolist() == [[0, 0, 1, 1, 2, 2, 2, 2]]
    assert extra.tolist() == [[False] * 5 + [True] * 3]
    (places, _), extra = shared_out(choose_where(mask & False), Axis("tp", 0, 4))
    assert places.shape == (1, 4), "a part for each rank, all of it extra"
    assert extra.all()
