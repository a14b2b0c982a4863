"""Surprise, gate and prior: the formulas of the DTF router and their gradients, in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.testing import assert_close

from megadyn.config import Config
from megadyn.kinds.dtf import Dtf
from megadyn.kinds.dtf.layers import DecisionLayer, DynamicLayer
from megadyn.kinds.dtf.prior import Prior
from megadyn.model.block import Stream
from megadyn.network import routed_layers
from megadyn.parallel.grid import Axis
from megadyn.routing import surprise
from megadyn.routing.choice import CausalRouter
from megadyn.routing.layer import LossScale
from megadyn.routing.select import Selection
from megadyn.routing.surprise import SurpriseRouter, gate_of, moving_average, relative_gate
from megadyn.routing.tracker import Monitor, RunningThreshold
from tests.helpers.naive import prior_update
from tests.helpers.networks import disturb, layer_context, make_network, param_maker, with_routing
from tests.helpers.tiny import tiny_config, tiny_tokens

F64 = torch.float64
NAMES = ("beta_ce", "beta_cu", "ce_log_offset", "cu_multiplier")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- the moving average --------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 7, 12, 100])
def test_the_moving_average_equals_a_loop(window):
    x = random(3, 12)
    want = torch.empty_like(x)
    for b in range(3):
        for t in range(12):
            want[b, t] = sum(x[b, max(s, 0)] for s in range(t - window + 1, t + 1)) / window
    assert_close(moving_average(x, window), want)


# ---- the router ----------------------------------------------------------------------------------


def surprise_router(config: Config) -> SurpriseRouter:
    routing = config.model.routing
    assert isinstance(routing, Dtf)
    return SurpriseRouter("model.layers.0.router", layer_context(config), routing)


def make_router(window: int = 3) -> SurpriseRouter:
    config = with_routing(tiny_config(), ma_window=window)
    return disturb(surprise_router(config), param_maker(config))


def surprises() -> tuple[Tensor, Tensor]:
    """D_st and D_ch, [2, 8]."""
    return random(2, 8).square().requires_grad_(), random(2, 8, seed=1).square().requires_grad_()


def reference_gate(static: Tensor, change: Tensor, average: Tensor, p: dict[str, Tensor]) -> Tensor:
    """`routing.md`, line by line; `average` is MA, held constant."""
    ce = static - change + p["ce_log_offset"]
    cu = static - p["cu_multiplier"] * average
    s_ce = 1 / (1 + torch.exp(-torch.log(1 + torch.exp(p["beta_ce"])) * ce))
    s_cu = 1 / (1 + torch.exp(-torch.log(1 + torch.exp(p["beta_cu"])) * cu))
    return s_ce + s_cu - s_ce * s_cu


def test_the_gate_and_its_gradients_equal_the_formulas_with_the_average_held_constant():
    router, (static, change) = make_router(), surprises()
    params = {name: getattr(router, name) for name in NAMES}
    gate = gate_of(router(static, change)[0])
    want = reference_gate(static, change, moving_average(static.detach(), 3), params)
    assert_close(gate, want)
    assert ((gate > 0) & (gate < 1)).all()
    inputs = [static, change, *params.values()]
    grad = random(2, 8, seed=5)
    got, wanted = torch.autograd.grad(gate, inputs, grad), torch.autograd.grad(want, inputs, grad)
    for name, mine, reference in zip(("static", "change", *NAMES), got, wanted, strict=True):
        assert reference.any(), name
        assert_close(mine, reference, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck_of_the_whole_router(monkeypatch):
    router, (static, change) = make_router(), surprises()
    average = moving_average(static.detach(), 3)
    monkeypatch.setattr(surprise, "moving_average", lambda x, window, documents: average)
    scalars = [getattr(router, name).detach().clone().requires_grad_() for name in NAMES]

    def gate(static: Tensor, change: Tensor, *values: Tensor) -> Tensor:
        return gate_of(functional_call(router, dict(zip(NAMES, values)), (static, change))[0])

    assert gradcheck(gate, (static, change, *scalars))


def test_the_moving_average_is_over_the_static_surprise_without_gradient(monkeypatch):
    router, (static, change) = make_router(window=5), surprises()
    seen = []
    monkeypatch.setattr(
        surprise, "moving_average", lambda x, *args: seen.append((x, args)) or moving_average(x, *args)
    )
    router(static, change)
    ((x, (window, documents)),) = seen
    assert window == 5
    assert documents is None
    assert torch.equal(x, static)
    assert not x.requires_grad


def test_the_router_starts_from_the_configured_scalars_and_reports_them():
    config = tiny_config()
    router = surprise_router(config)
    static, change = surprises()
    _, watched = router(static, change)
    assert [round(getattr(router, name).item(), 6) for name in NAMES] == [-0.3, -0.6, 0.024693, 1.1]
    for name in NAMES:
        assert_close(watched[name], getattr(router, name).detach().squeeze())
    assert_close(watched["D_st"], static.mean().detach())
    assert_close(watched["D_ch"], change.mean().detach())
    assert not any(value.requires_grad for value in watched.values())


def test_the_report_does_not_change_with_the_parameters_it_was_read_from():
    router, (static, change) = make_router(), surprises()
    _, watched = router(static, change)
    before = watched["beta_ce"].item()
    with torch.no_grad():
        router.beta_ce += 1
    assert watched["beta_ce"].item() == before


# ---- the prior -----------------------------------------------------------------------------------


def make_prior() -> Prior:
    config = tiny_config()
    return disturb(Prior("model.layers.0.prior", 6, 4, 1e-6, make=param_maker(config)), param_maker(config))


@pytest.mark.parametrize("with_surprise", [True, False])
def test_surprises_loss_and_their_gradients_equal_two_passes_of_the_prior(with_surprise):
    """As the formulas have it: one pass for the surprise, and one on held states whose loss teaches the prior alone."""
    prior, h, post = make_prior(), random(2, 3, 6).requires_grad_(), random(2, 3, 6, seed=1).requires_grad_()
    weights = list(prior.parameters())
    found = prior(h, post)
    held = (h + prior_update(prior, h)).detach() if not with_surprise else h + prior_update(prior, h)
    want = (
        (post - h).square().mean(dim=-1),
        (post - held).square().mean(dim=-1),
        (h.detach() + prior_update(prior, h.detach()) - post.detach()).square().mean(),
    )
    assert_close(found, want)
    grads = (random(2, 3, seed=2), random(2, 3, seed=3) * with_surprise, torch.tensor(0.7, dtype=F64))
    got, wanted = (torch.autograd.grad(outputs, [h, post, *weights], grads) for outputs in (found, want))
    for name, mine, reference in zip(("h", "post", "norm", "gate", "up", "down"), got, wanted, strict=True):
        assert reference.any(), name
        assert_close(mine, reference, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck_of_the_surprises():
    prior, h, post = make_prior(), random(2, 3, 6).requires_grad_(), random(2, 3, 6, seed=1).requires_grad_()
    names = [name for name, _ in prior.named_parameters()]
    values = [
        (p.detach() * 20 if p.ndim == 2 else p.detach()).clone().requires_grad_() for p in prior.parameters()
    ]
    assert len(names) == 4
    assert gradcheck(
        lambda h, post, *values: functional_call(prior, dict(zip(names, values)), (h, post))[:2],
        (h, post, *values),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_of_the_surprises_are_near_float64s(dtype):
    prior, h, post = make_prior(), random(2, 3, 6), random(2, 3, 6, seed=1)
    grads = random(2, 3, seed=2), random(2, 3, seed=3), torch.tensor(0.7, dtype=F64)
    results = []
    for kind in (F64, dtype):
        prior = prior.to(kind)
        inputs = [x.to(dtype).to(kind).requires_grad_() for x in (h, post)]
        outputs = prior(*inputs)
        assert {out.dtype for out in outputs} == {torch.promote_types(kind, torch.float32)}
        found = torch.autograd.grad(
            outputs, [*inputs, *prior.parameters()], [g.to(out.dtype) for g, out in zip(grads, outputs)]
        )
        assert {x.dtype for x in found} == {kind}
        results.append([*outputs, *found])
    for exact, rounded in zip(*results, strict=True):
        assert_close(rounded.double(), exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


# ---- the layers ----------------------------------------------------------------------------------


def make_layer(build: type[nn.Module], loss_scale: float = 1.0, **routing: object) -> nn.Module:
    config = with_routing(tiny_config(), **routing)
    index = config.model.layer_types.index("dtf_decision" if build is DecisionLayer else "dtf_dynamic")
    return disturb(build(layer_context(config), index, LossScale(loss_scale)), param_maker(config))


def causal_at(layer: DynamicLayer, threshold: float) -> DynamicLayer:
    """Under the causal rule, with this threshold."""
    layer.causal_router.mode = "causal"
    return with_threshold(layer, threshold)


def with_threshold(layer: DynamicLayer, threshold: float) -> DynamicLayer:
    layer.causal_router.threshold = RunningThreshold(0.0, threshold, steps=1)
    return layer


def test_a_decision_layer_is_dense_and_scores_what_it_did():
    layer, h = make_layer(DecisionLayer), random(2, 9, 32)
    post, score, _ = layer(Stream(h))
    assert_close(post, layer.dense(h))
    static = (post - h).square().mean(dim=-1)
    change = (post - (h + prior_update(layer.prior, h))).square().mean(dim=-1)
    assert_close(score, layer.router(static, change)[0])
    assert_close(layer.monitor.read()["prior_loss"].double(), change.mean().detach(), rtol=1e-6, atol=0)


def test_both_surprises_send_gradients_into_the_layer_and_its_input():
    layer, h = make_layer(DecisionLayer, 0.0), random(2, 9, 32).requires_grad_()
    score = layer(Stream(h)).score
    score.backward(random(2, 9, seed=1))
    for param in layer.parameters():
        assert param.grad is not None, param.global_name
        assert param.grad.any(), param.global_name
    assert h.grad.any()


def test_a_dynamic_layer_runs_its_block_among_the_chosen_of_each_sequence_alone():
    layer, h, score = make_layer(DynamicLayer, capacity=0.4), random(3, 10, 32), torch.rand(3, 10, dtype=F64)
    gate = 1 - (-score).exp()
    out, passed_on, documents = layer(Stream(h, score))
    assert passed_on is documents is None
    for b in range(3):
        chosen = sorted(sorted(range(10), key=lambda t: -score[b, t].item())[:4])
        delta = layer.delta(h[b : b + 1, chosen], torch.tensor([chosen]), 10)[0]
        for t in range(10):
            if t in chosen:
                assert_close(out[b, t], h[b, t] + gate[b, t] * delta[chosen.index(t)])
            else:
                assert torch.equal(out[b, t], h[b, t])


def test_under_a_threshold_a_sequence_may_choose_any_number_even_none():
    layer, h, score = make_layer(DynamicLayer), random(3, 10, 32), torch.rand(3, 10, dtype=F64) * 0.5
    causal_at(layer, 0.6)
    score[1, [2, 3, 7]] += 0.6
    score[2, 5] = 0.6000001
    gate = 1 - (-score).exp()
    out = layer(Stream(h, score)).hidden
    changed = (out != h).any(dim=-1)
    assert [row.nonzero().flatten().tolist() for row in changed] == [[], [2, 3, 7], [5]]
    delta = layer.delta(h[1:2, [2, 3, 7]], torch.tensor([[2, 3, 7]]), 10)[0]
    assert_close(out[1, [2, 3, 7]], h[1, [2, 3, 7]] + gate[1, [2, 3, 7], None] * delta)


def test_a_score_at_the_threshold_routes():
    layer, score = causal_at(make_layer(DynamicLayer), 0.5), torch.tensor([[0.5, 0.49999997, 0.5000001, 0.1]])
    assert layer.causal_router(score, torch.zeros(1, 4, 32)).selection.places.tolist() == [[0, 2]]


@pytest.mark.parametrize(
    "chosen",
    [[(0, 0), (0, 2), (0, 3), (1, 1), (1, 2), (1, 4)], [(0, 0), (0, 2), (1, 1)]],
    ids=["topk", "ragged"],
)
def test_gradcheck_of_the_path_through_the_gate(chosen):
    layer = make_layer(DynamicLayer)
    h, gate = random(2, 5, 32).requires_grad_(), torch.rand(2, 5, dtype=F64).requires_grad_()
    places = torch.tensor([[5 * b + t for b, t in chosen]])
    selection = Selection(places.view(2, 3)) if len(chosen) == 6 else Selection(places, places // 5)
    assert gradcheck(lambda h, gate: layer.update(Stream(h), gate, selection), (h, gate), fast_mode=True)
    assert gradcheck(lambda gate: layer.update(Stream(h), gate, selection), (gate,))
    layer.update(Stream(h), gate, selection).backward(random(2, 5, 32, seed=1))
    assert [tuple(where) for where in gate.grad.nonzero().tolist()] == chosen


def test_a_dynamic_layer_observes_its_kth_highest_score_in_training_only():
    layer, h, score = make_layer(DynamicLayer, capacity=0.4), random(3, 10, 32), torch.rand(3, 10, dtype=F64)
    threshold = layer.causal_router.threshold
    with torch.no_grad():
        layer(Stream(h, score))
    with pytest.raises(AssertionError):
        threshold.take_step_mean()
    layer(Stream(h, score))
    want = score.sort(dim=1, descending=True).values[:, 3].mean()
    assert_close(threshold.take_step_mean().double(), want, rtol=1e-6, atol=0)


# ---- statistics ----------------------------------------------------------------------------------


def test_a_monitor_shows_means_since_its_last_reading():
    monitor = Monitor()
    assert monitor.read() == {}
    monitor.record({"a": torch.tensor(1.0), "b": torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True)})
    monitor.record({"a": torch.tensor(4.0), "b": torch.tensor(3.0, dtype=torch.bfloat16)})
    means = monitor.read()
    assert {name: value.item() for name, value in means.items()} == {"a": 2.5, "b": 2.5}
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in means.values())
    monitor.record({"a": torch.tensor(7.0)})
    assert monitor.read() == {"a": torch.tensor(7.0)}


def test_routing_statistics_equal_their_definitions():
    layer, h, gate = (
        make_layer(DynamicLayer, capacity=0.4),
        random(3, 10, 32),
        random(3, 10, seed=2).sigmoid(),
    )
    score = -(1 - gate).log()
    with_threshold(layer, 0.8)
    layer(Stream(h, score))
    found = {name: value.item() for name, value in layer.monitor.read().items()}
    top = torch.zeros(3, 10, dtype=torch.bool).scatter(1, gate.topk(4, dim=1).indices, True)
    always = {
        "gate_routed": gate[top].mean(),
        "gate_routed_std": gate[top].std(correction=0),
        "threshold": 0.8,
        "gate_unrouted": gate[~top].mean(),
        "gate_unrouted_std": gate[~top].std(correction=0),
        "causal_fraction": (score >= 0.8).double().mean(),
        "causal_agreement": (top == (score >= 0.8)).double().mean(),
    }
    always = {name: float(value) for name, value in always.items()}
    assert found == pytest.approx(
        {"routed_fraction": 0.4, "routed_fraction_min": 0.4, "routed_fraction_max": 0.4, **always}, rel=1e-5
    )
    causal_at(layer, 0.8)
    layer(Stream(h, score))
    found = {name: value.item() for name, value in layer.monitor.read().items()}
    fractions = (score >= 0.8).double().mean(dim=1).tolist()
    assert min(fractions) < max(fractions)
    assert found == pytest.approx(
        {
            "routed_fraction": sum(fractions) / 3,
            "routed_fraction_min": min(fractions),
            "routed_fraction_max": max(fractions),
            **always,
        },
        rel=1e-5,
    )


# ---- precision -----------------------------------------------------------------------------------


def test_surprise_gate_and_threshold_are_float32_in_a_bf16_model(monkeypatch):
    network = make_network(tiny_config(), dtype=torch.bfloat16)
    surprise, gates = [], []
    forward, choose = SurpriseRouter.forward, CausalRouter.forward
    monkeypatch.setattr(
        SurpriseRouter, "forward", lambda self, *x: surprise.extend(x[:2]) or forward(self, *x)
    )
    monkeypatch.setattr(
        CausalRouter, "forward", lambda self, gate, hidden: gates.append(gate) or choose(self, gate, hidden)
    )
    tokens = tiny_tokens(1)[0]
    loss = network(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert len(surprise) == 4
    assert len(gates) == 2
    for score in (*surprise, *gates):
        assert score.dtype == torch.float32
        assert not torch.equal(score, score.bfloat16().float()), "rounded to bf16 on the way"
    assert loss.dtype == torch.float32
    for layer in network.layers:
        if isinstance(layer, DynamicLayer):
            threshold = layer.causal_router.threshold
            mean = threshold.take_step_mean()
            assert mean.dtype == torch.float64
            threshold.end_step(mean)
            assert threshold.value.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 for p in network.parameters())


def test_the_static_surprise_of_a_bf16_layer_is_taken_in_float32():
    config = tiny_config()
    layer = disturb(
        DecisionLayer(layer_context(config, dtype=torch.bfloat16), 0, LossScale()), param_maker(config)
    )
    h = random(2, 9, 32).bfloat16()
    post = layer.dense(h)
    seen = []
    layer.router.register_forward_hook(lambda module, inputs, output: seen.extend(inputs))
    layer(Stream(h))
    update = prior_update(layer.prior, h)
    assert_close(seen[0], (post.float() - h.float()).square().mean(dim=-1), rtol=1e-6, atol=0)
    assert_close(
        seen[1], (post.float() - (h.float() + update.float())).square().mean(dim=-1), rtol=0.02, atol=0
    )


# ---- criteria and gates relative to their own level ----------------------------------------------


def test_scale_free_scores_do_not_depend_on_the_size_of_the_updates():
    config = with_routing(tiny_config(), ma_window=3, scale_free=True)
    router = disturb(surprise_router(config), param_maker(config))
    static, change = (x.detach() for x in surprises())
    score = router(static, change)[0]
    assert_close(router(100 * static, 100 * change)[0], score)
    average = moving_average(static, 3)
    params = {name: getattr(router, name).detach() for name in NAMES}
    want = reference_gate(static / average, change / average, torch.ones_like(average), params)
    assert_close(gate_of(score), want)
    assert not torch.allclose(make_router()(static, change)[0], score)


def test_a_layer_that_changes_nothing_has_finite_scale_free_scores():
    config = with_routing(tiny_config(), scale_free=True)
    router = surprise_router(config)
    zeros = torch.zeros(2, 8, dtype=F64, requires_grad=True)
    score, _ = router(zeros, zeros)
    score.sum().backward()
    assert score.isfinite().all() and zeros.grad is not None and zeros.grad.isfinite().all()


def test_a_factor_common_to_all_gates_cancels_in_relative_gates_and_their_gradient():
    gate = (random(2, 8).sigmoid() * 0.9).requires_grad_()
    scores = [-torch.log1p(-factor * gate) for factor in (1, 0.3)]
    relative = [relative_gate(score, 4, Axis("seq")) for score in scores]
    assert_close(relative[0], relative[1])
    assert_close(relative[0][:, 0], torch.ones(2, dtype=F64))
    (grad,) = torch.autograd.grad(relative[0], gate, random(2, 8, seed=5))
    assert grad.abs().max() > 0.1
    assert_close((grad * gate).sum(dim=1), torch.zeros(2, dtype=F64))


def test_the_statistics_have_what_multiplies_the_update():
    config = tiny_config("dtf-relative")
    network = make_network(config)
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:])
    for layer in (layer for layer in routed_layers(network) if layer.chooses):
        found = layer.monitor.read()
        share = float(found["routed_fraction"])
        mean = share * float(found["gate_routed"]) + (1 - share) * float(found["gate_unrouted"])
        assert mean == pytest.approx(1, abs=0.05) and found["gate_routed"] > found["gate_unrouted"]
