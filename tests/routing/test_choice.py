"""The causal rules beside top-k: what each chooses, learns from and reports."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from megadyn.routing.choice import CausalRouter
from megadyn.routing.select import as_mask
from megadyn.routing.tracker import RunningThreshold
from tests.helpers.naive import best
from tests.helpers.networks import layer_context, numbers, with_routing
from tests.helpers.tiny import tiny_config

B, T, D = 3, 10, 32
SHAPE = torch.Size([1, 4])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_router(
    kind: str, mode: str = "topk", threshold: float | None = None, **routing: object
) -> CausalRouter:
    config = with_routing(tiny_config(kind), capacity=0.4, **routing)
    router = CausalRouter("model.layers.1.causal_router", layer_context(config))
    router.mode = mode
    if threshold is not None:
        router.threshold = RunningThreshold(0.0, threshold, steps=1)
    return router


def predictor(router: CausalRouter, h: Tensor) -> Tensor:
    hidden = h @ router.fc1.weight.T
    return (hidden / (1 + torch.exp(-hidden))) @ router.fc2.weight[0]


RULES = {
    "dtf": "threshold",
    "dtf-predictor": "predictor",
    "mod": "threshold",
    "mod-predictor": "predictor",
    "mod-bce": "bce",
    "dtrnet-expert": "threshold",
}


@pytest.mark.parametrize("mode", ["topk", "causal"])
@pytest.mark.parametrize("kind", RULES)
def test_what_is_chosen_and_reported(kind, mode):
    router = make_router(kind, mode, threshold=0.3 if RULES[kind] == "threshold" else None)
    score, h = random(B, T), random(B, T, D, seed=1)
    top = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        top[b, best(score[b].tolist(), 4)] = True
    rule = RULES[kind]
    causal = (
        score >= 0.3
        if rule == "threshold"
        else score > 0
        if rule == "bce"
        else predictor(router, h).sigmoid() >= 0.5
    )
    assert not torch.equal(causal, top)
    assert 0.1 < causal.double().mean() < 0.9
    found = router(score, h)
    want = causal if mode == "causal" else top
    assert torch.equal(as_mask(found.selection, want.shape), want)
    assert torch.equal(found.in_top, top), "whatever the mode"
    fraction = want.double().mean(dim=1).tolist()
    reported = {name: float(value) for name, value in numbers(found.statistics).items()}
    special = {
        "threshold": {"threshold": 0.3},
        "predictor": {"predictor_loss": reported.get("predictor_loss")},
        "bce": {},
    }
    assert reported == pytest.approx(
        {
            "routed_fraction": sum(fraction) / B,
            "routed_fraction_min": min(fraction),
            "routed_fraction_max": max(fraction),
            "causal_fraction": causal.double().mean().item(),
            "causal_agreement": (top == causal).double().mean().item(),
        }
        | special[rule]
    )


@pytest.mark.parametrize("kind", RULES)
def test_only_a_rule_that_needs_them_has_a_threshold_or_parameters(kind):
    router = make_router(kind)
    assert (router.threshold is not None) == (RULES[kind] == "threshold")
    shapes = {name: tuple(param.shape) for name, param in router.named_parameters()}
    assert shapes == ({"fc1.weight": (16, 32), "fc2.weight": (1, 16)} if RULES[kind] == "predictor" else {})


@pytest.mark.parametrize("score", [0.0, -1e-300])
def test_bce_routes_strictly_above_zero_and_the_predictor_at_zero(score, monkeypatch):
    router = make_router("mod-bce", "causal")
    assert not as_mask(router(torch.full((1, 4), score), torch.zeros(1, 4, D)).selection, SHAPE).any()
    assert as_mask(router(torch.full((1, 4), 1e-30), torch.zeros(1, 4, D)).selection, SHAPE).all()
    monkeypatch.setattr(
        CausalRouter, "predict", lambda self, hidden: torch.full((1, 4), score, dtype=torch.float64)
    )
    chosen = as_mask(
        make_router("mod-predictor", "causal")(torch.zeros(1, 4), torch.zeros(1, 4, D)).selection, SHAPE
    )
    assert chosen.all() == chosen.any() == (score == 0)


@pytest.mark.parametrize("kind", ["dtf-predictor", "mod-predictor"])
def test_the_predictors_loss_is_the_formula_and_reaches_the_predictor_alone(kind):
    router = make_router(kind, predictor_loss_weight=0.7)
    score, h = random(B, T).requires_grad_(), random(B, T, D, seed=1).requires_grad_()
    found = router(score, h)
    p = predictor(router, h).sigmoid()
    y = found.in_top.double()
    want = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert_close(found.loss, 0.7 * want)
    assert_close(found.statistics["predictor_loss"], want.detach())
    params = list(router.parameters())
    for mine, reference in zip(
        torch.autograd.grad(found.loss, params, retain_graph=True),
        torch.autograd.grad(0.7 * want, params),
        strict=True,
    ):
        assert_close(mine, reference)
    found.loss.backward()
    assert score.grad is None
    assert h.grad is None
    assert not found.statistics["predictor_loss"].requires_grad


def test_the_predictor_learns_the_top_k_choice():
    """A hundred steps on a score that it can express."""
    router, h = make_router("mod-predictor", predictor_loss_weight=1.0), random(8, 40, D)
    score = h @ random(D, seed=3)
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    first = router(score, h).statistics["causal_agreement"]
    for _ in range(100):
        optimizer.zero_grad()
        router(score, h).loss.backward()
        optimizer.step()
    last = router(score, h).statistics["causal_agreement"]
    assert first < 0.8 < 0.95 < last


@pytest.mark.parametrize("kind", [kind for kind, rule in RULES.items() if rule == "threshold"])
def test_the_kth_highest_is_observed_in_training_alone(kind):
    router, score, h = make_router(kind), random(B, T), random(B, T, D)
    with torch.no_grad():
        router(score, h)
    with pytest.raises(AssertionError):
        router.threshold.take_step_mean()
    router(score, h)
    router(score + 1, h)
    want = score.sort(dim=1, descending=True).values[:, 3].mean() + 0.5
    assert_close(router.threshold.take_step_mean().double(), want, rtol=1e-6, atol=1e-6)


def test_a_bf16_models_predictor_gives_its_logits_in_float32():
    config = tiny_config("mod-predictor")
    router = CausalRouter("model.layers.1.causal_router", layer_context(config, dtype=torch.bfloat16))
    h = random(B, T, D).bfloat16()
    logits = router.predict(h)
    assert logits.dtype == torch.float32
    want = F.silu(h @ router.fc1.weight.T) @ router.fc2.weight[0]
    assert_close(logits, want.float(), rtol=0.02, atol=0.02)
    assert router(random(B, T).float(), h).loss.dtype == torch.float32
