"""STT: training and use against loops over tokens written from its README, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from megadyn.errors import ConfigError
from megadyn.kinds import make_kind
from megadyn.kinds.stt import layers
from megadyn.kinds.stt.layers import SubjectiveLayer, since_border
from megadyn.model.block import Stream
from megadyn.model.documents import from_ids
from megadyn.planning.flops import layer_costs
from tests.helpers.naive import NaiveLayer, best, prior_update
from tests.helpers.networks import disturb, make_layer, param_maker, with_routing
from tests.helpers.tiny import tiny_config
from tests.hf.tiny_models import random_tokens, tiny_model

T = 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subjective(**routing: object) -> tuple[SubjectiveLayer, NaiveLayer]:
    settings = {
        "capacity": 0.5,
        "ma_window": 3,
        "prior_loss_weight": 0.0,
        "predictor_loss_weight": 0.0,
    } | routing
    config = with_routing(tiny_config("stt", hidden_size=16, ffn_size=24), **settings)
    layer = disturb(make_layer(config, 3), param_maker(config))
    return layer, NaiveLayer(layer, config.model)


def by_loop(naive: NaiveLayer, layer: SubjectiveLayer, h: Tensor, seen: list[int], topk: bool) -> Tensor:
    """One sequence [T, D] without documents; the layer sees `seen`."""
    p, delta, static, scores, gates = naive.params, naive.block(h, seen), [], [], {}
    for place, t in enumerate(seen):
        before = (h[seen[place - 1]] + delta[seen[place - 1]]).detach() if place else torch.zeros_like(h[0])
        change = (delta[t] - prior_update(layer.prior, before)).square().mean()
        static.append(delta[t].square().mean())
        average = sum(static[max(s, 0)].detach() for s in range(place - 2, place + 1)) / 3
        a = torch.log1p(p["router.beta_ce"].exp()) * (static[-1] - change + p["router.ce_log_offset"])
        b = torch.log1p(p["router.beta_cu"].exp()) * (static[-1] - p["router.cu_multiplier"] * average)
        scores.append((torch.log1p(a.exp()) + torch.log1p(b.exp())).squeeze())
        gates[t] = 1 - (1 - a.sigmoid()) * (1 - b.sigmoid())
    kept = [seen[row] for row in best([r.item() for r in scores], 4)] if topk else seen
    return torch.stack([h[t] + gates[t] * delta[t] if t in kept else h[t] for t in range(len(h))])


@pytest.mark.parametrize("topk", [True, False])
def test_it_is_the_loop_with_all_gradients(topk):
    layer, naive = subjective()
    layer.causal_router.mode = "topk" if topk else "causal"
    h = random(2, T, 16).requires_grad_()
    taken = layer.causal_router.predict(h) >= 0
    assert 0 < taken.sum() < taken.numel()
    seen = [list(range(T)) if topk else row.nonzero().flatten().tolist() for row in taken]
    want = torch.stack([by_loop(naive, layer, row, tokens, topk) for row, tokens in zip(h, seen)])
    found = layer(Stream(h)).hidden
    assert_close(found, want)
    names, params = zip(*((name, p) for name, p in layer.named_parameters() if "causal_router" not in name))
    grad = random(*found.shape, seed=9)
    mine, reference = (torch.autograd.grad(x, [h, *params], grad) for x in (found, want))
    for name, x, y in zip(("h", *names), mine, reference, strict=True):
        assert y.abs().max() > 1e-9 or name.endswith("k_proj.bias"), name
        assert_close(x, y, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_the_priors_loss_is_the_formula_and_reaches_the_prior_alone():
    layer, _ = subjective()
    h = random(2, T, 16).requires_grad_()
    delta, _, loss, _ = layer.surprise(Stream(h), None)
    before = torch.cat([torch.zeros_like(h[:, :1]), (h + delta)[:, :-1]], dim=1)
    assert_close(loss, (delta - prior_update(layer.prior, before)).square().mean())
    reached = [
        name
        for (name, _), grad in zip(
            layer.named_parameters(), torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
        )
        if grad is not None and grad.any()
    ]
    assert sorted(reached) == ["prior.down_proj", "prior.gate_proj", "prior.norm", "prior.up_proj"]


def test_gradcheck_of_the_transition_network():
    layer, _ = subjective()
    before, delta = random(2, 3, 16), random(2, 3, 16, seed=1).requires_grad_()
    names = [name for name, _ in layer.prior.named_parameters()]

    def run(delta: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.func.functional_call(layer.prior, dict(zip(names, weights)), (before, delta))
        return found[0], found[1]

    assert gradcheck(run, (delta, *(p.detach().clone().requires_grad_() for p in layer.prior.parameters())))


@pytest.mark.parametrize("mode", ["topk", "causal"])
@torch.no_grad()
def test_documents_of_a_sample_are_computed_as_if_each_stood_alone(mode):
    """All of them taken, so that top-k chooses among no others."""
    layer, _ = subjective(capacity=1.0)
    layer.causal_router.mode = mode
    h = random(1, T, 16)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    together = layer(Stream(h, documents=from_ids(ids))).hidden
    apart = torch.cat([layer(Stream(part)).hidden for part in (h[:, :4], h[:, 4:])], dim=1)
    assert_close(together, apart)
    assert not torch.allclose(layer(Stream(h)).hidden, apart)


@torch.no_grad()
def test_at_capacity_one_with_gates_of_one_it_is_dense(monkeypatch):
    layer, _ = subjective(capacity=1.0)
    h = random(2, T, 16)
    monkeypatch.setattr(layers, "gate_of", torch.ones_like)
    assert_close(layer(Stream(h)).hidden, layer.dense(h))


@torch.no_grad()
def test_where_the_predictor_takes_nothing_nothing_happens(monkeypatch):
    layer, _ = subjective()
    layer.causal_router.mode = "causal"
    monkeypatch.setattr(layer.causal_router, "predict", lambda hidden: torch.full(hidden.shape[:2], -1.0))
    h = random(2, T, 16)
    assert torch.equal(layer(Stream(h)).hidden, h)
    assert layer.monitor.read()["routed_fraction"] == 0


def test_places_since_a_border():
    ids = torch.tensor([[0, 0, 3, 3, 3, 4], [5, 6, 6, 6, 6, 6]])
    assert since_border(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]


def test_training_saves_nothing_whatever_the_capacity():
    costs = [
        layer_costs(with_routing(tiny_config("stt"), capacity=capacity).model, 24)[1]
        for capacity in (0.1, 1.0)
    ]
    dense = layer_costs(tiny_config("dense").model, 24)[1]
    assert costs[0] == costs[1] > dense
    assert math.isclose(costs[0], dense + 2 * 24 * (3 * 32 * 2 + 32 * 16 + 16))


def test_a_resumed_run_keeps_layout_and_prior():
    assert {"layout", "prior_factor"} <= make_kind("stt").fixed.keys()


def test_rules_that_it_cannot_have_are_refused():
    for keys in ({"causal": "threshold"}, {"choose": "threshold"}):
        with pytest.raises(ConfigError):
            make_kind("stt", **keys)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["topk", "causal"])
def test_padding_on_either_side_changes_nothing_in_an_export(mode):
    model, tokens = tiny_model("stt", mode), random_tokens(1, 15)
    alone, pad = model(tokens, use_cache=False).logits, random_tokens(1, 6, seed=3)
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(pad)
    left = model(
        torch.cat([pad, tokens], 1), attention_mask=torch.cat([zeros, ones], 1), use_cache=False
    ).logits[:, 6:]
    right = model(
        torch.cat([tokens, pad], 1), attention_mask=torch.cat([ones, zeros], 1), use_cache=False
    ).logits[:, :15]
    assert_close(left, alone, atol=1e-4, rtol=0)
    assert_close(right, alone, atol=1e-4, rtol=0)
