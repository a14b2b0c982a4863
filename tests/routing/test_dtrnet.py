"""DTRNet's router, jitter and safe minimum, and MoD's router: formulas and definitions."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.testing import assert_close

from megadyn.kinds.dtrnet.layers import DtrLayer
from megadyn.kinds.mod.layers import ModLayer
from megadyn.model.block import Stream
from megadyn.routing.choice import LinearRouter, TwoLayerRouter
from megadyn.routing.layer import LossScale
from megadyn.routing.select import as_mask
from tests.helpers.naive import best
from tests.helpers.networks import (
    disturb,
    end_step,
    layer_context,
    make_network,
    numbers,
    param_maker,
    with_routing,
)
from tests.helpers.tiny import tiny_config, tiny_tokens

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- routers -------------------------------------------------------------------------------------

AttentionRouter = partial(TwoLayerRouter, width=4, outputs=2)
ROUTERS = pytest.mark.parametrize("build", [LinearRouter, AttentionRouter], ids=["linear", "two-layer"])


def make_router(build: Callable[..., torch.nn.Module], dtype: torch.dtype = F64) -> torch.nn.Module:
    config = tiny_config("mod", hidden_size=8)
    return disturb(build("model.layers.1.router", layer_context(config, dtype=dtype)), param_maker(config))


def test_the_linear_router_is_one_row_without_bias():
    router, h = make_router(LinearRouter), random(2, 5, 8)
    assert [tuple(p.shape) for p in router.parameters()] == [(1, 8)]
    assert_close(
        router(h), torch.stack([torch.stack([router.weight[0] @ token for token in row]) for row in h])
    )


def test_the_attention_router_is_two_layers_with_biases():
    router, h = make_router(AttentionRouter), random(2, 5, 8)
    assert [tuple(p.shape) for p in router.parameters()] == [(4, 8), (4,), (2, 4), (2,)]
    inner = h @ router.fc1.weight.T + router.fc1.bias
    assert_close(router(h), (inner / (1 + torch.exp(-inner))) @ router.fc2.weight.T + router.fc2.bias)


@ROUTERS
def test_gradcheck_of_the_routers(build):
    router, h = make_router(build), random(2, 3, 8).requires_grad_()
    names, values = zip(
        *((name, p.detach().clone().requires_grad_()) for name, p in router.named_parameters())
    )
    assert gradcheck(lambda h, *values: functional_call(router, dict(zip(names, values)), (h,)), (h, *values))


def test_the_attention_router_starts_without_preference():
    router = DtrLayer(layer_context(tiny_config("dtrnet-token")), 1, LossScale()).router
    assert not router.fc1.bias.any()
    assert not router.fc2.bias.any()


@ROUTERS
def test_logits_of_a_bf16_model_are_float32(build):
    router, h = make_router(build, torch.bfloat16), random(2, 5, 8).bfloat16()
    logits = router(h)
    want = router.double()(h.double())  # of the same, rounded weights: only arithmetic differs
    assert logits.dtype == torch.float32
    assert_close(logits, want.float(), rtol=1e-5, atol=1e-6)


def test_choices_of_a_bf16_network_are_made_in_float32(monkeypatch):
    seen = []
    choice = DtrLayer.choice
    monkeypatch.setattr(
        DtrLayer, "choice", lambda self, lead, hidden: seen.append(lead) or choice(self, lead, hidden)
    )
    network = make_network(tiny_config("dtrnet-expert"), dtype=torch.bfloat16)
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:]).backward()
    assert len(seen) == 3
    for lead in seen:
        assert lead.dtype == torch.float32
        assert not torch.equal(lead, lead.bfloat16().float()), "rounded to bf16 on the way"
    assert all(p.grad.dtype == torch.bfloat16 for p in network.parameters())


# ---- the safe minimum ----------------------------------------------------------------------------


def make_layer(kind: str = "dtrnet-token", loss_scale: float = 1.0, **routing: object) -> DtrLayer:
    config = with_routing(tiny_config(kind), **routing)
    return disturb(DtrLayer(layer_context(config), 1, LossScale(loss_scale)), param_maker(config))


@pytest.mark.parametrize("least", [0.0, 0.05, 0.33, 0.55, 1.0])
@pytest.mark.parametrize("shift", [-1.0, -0.3, 0.0, 1.0])
def test_the_safe_minimum_fills_up_with_exactly_the_best_and_in_training_only(least, shift):
    layer, h = make_layer(safe_min_attn_ratio=least), random(6, 20, 32)
    lead = random(6, 20) + shift
    own = lead > 0
    selection, mask, statistics = layer.choice(lead, h)
    short = 0
    for b in range(6):
        wanted = own[b].nonzero().flatten().tolist()
        if len(wanted) < math.ceil(least * 20):
            wanted, short = best(lead[b].tolist(), math.ceil(least * 20)), short + 1
        assert mask[b].nonzero().flatten().tolist() == wanted
    assert (mask | ~own).all(), "who wants to attend does"
    assert torch.equal(as_mask(selection, mask.shape), mask)
    assert numbers(statistics).get("refills", 0.0) == pytest.approx(short / 6)
    with torch.no_grad():
        selection, mask, statistics = layer.choice(lead, h)
    assert torch.equal(mask, own)
    assert torch.equal(as_mask(selection, mask.shape), own)
    assert "refills" not in statistics
    statistics = numbers(statistics)
    assert_close(statistics["routed_fraction"], own.float().mean())
    assert_close(statistics["routed_fraction_max"], own.float().mean(dim=1).max())
    assert_close(statistics["routed_fraction_min"], own.float().mean(dim=1).min())


def test_a_token_of_even_odds_passes():
    _, mask, _ = make_layer(safe_min_attn_ratio=0.0).choice(
        torch.tensor([[0.0, 1e-9, -1e-9]]), torch.zeros(1, 3, 32)
    )
    assert mask.tolist() == [[False, True, False]]


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_tokens_of_saturated_probabilities_are_ranked_by_their_logits(shift):
    """p0 of all of them is 0 or 1 in float32; they must not tie, which would choose a sequence's first tokens."""
    config = with_routing(tiny_config("dtrnet-expert"), capacity=0.4)
    layer = disturb(DtrLayer(layer_context(config, dtype=torch.float32), 1, LossScale()), param_maker(config))
    h = random(3, 20, 32).float()
    with torch.no_grad():
        layer.router.fc2.bias[0] += shift
        logits = layer.router(h)
    assert logits.softmax(dim=-1)[..., 0].unique().numel() == 1
    lead = logits[..., 0] - logits[..., 1]
    chosen = []
    layer.choice = lambda lead, hidden: chosen.append(type(layer).choice(layer, lead, hidden)) or chosen[-1]
    layer(Stream(h))
    assert [row.nonzero().flatten().tolist() for row in chosen[0][1]] == [
        best(row.tolist(), 8) for row in lead
    ]


def test_tokens_filled_up_attend_with_their_own_p0():
    """The whole layer, where nobody wants to attend but the two best must."""
    layer, h = make_layer(safe_min_attn_ratio=0.2), random(2, 10, 32)
    with torch.no_grad():
        layer.router.fc2.bias[1] += 20
    p = layer.probabilities(h)
    assert (p[..., 0] < 0.5).all()
    trained = layer(Stream(h)).hidden
    with torch.no_grad():
        evaluated = layer(Stream(h)).hidden
    changed = (trained != evaluated).any(dim=-1)
    assert [row.nonzero().flatten().tolist() for row in changed] == [
        best(row.tolist(), 2) for row in p[..., 0]
    ]


@pytest.mark.parametrize(("layout", "least"), [("zero_attn", 0.05), ("zero_attn", 0.2), ("bilayer", 0.2)])
def test_a_strong_attention_loss_does_not_push_attention_below_the_safe_minimum(layout, least):
    """It would: without the minimum the same training leaves no token that attends."""

    def train(least: float) -> list[tuple[float, float]]:
        """Of each step, the lowest fraction of any sequence and layer, and how many were filled up."""
        config = with_routing(
            tiny_config("dtrnet-token"),
            layout=layout,
            aux_loss_lambda=5.0,
            aux_loss_warmup=0,
            safe_min_attn_ratio=least,
        )
        network, tokens = make_network(config, dtype=torch.float32), tiny_tokens(1)[0]
        layers = [layer for layer in network.layers if isinstance(layer, DtrLayer)]
        assert len(layers) == (4 if layout == "zero_attn" else 2)
        optimizer, seen, losses = torch.optim.Adam(network.parameters(), lr=0.01), [], []
        for _ in range(40):
            optimizer.zero_grad()
            loss = network(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            end_step(network)
            records = [layer.monitor.read() for layer in layers]
            losses.append(loss.item())
            seen.append(
                (
                    min(record["routed_fraction_min"].item() for record in records),
                    sum(record["refills"].item() for record in records if least),
                )
            )
        assert losses[-1] < losses[0] - 1
        return seen

    assert train(0.0)[-1][0] == 0
    seen = train(least)
    assert min(lowest for lowest, _ in seen) >= least
    assert seen[-1][1] > 0, "the minimum is at work to the end"


# ---- jitter --------------------------------------------------------------------------------------


def test_jitter_multiplies_each_logit_by_noise_within_its_bounds():
    layer, h = make_layer(jitter=0.25), random(8, 50, 32)
    logits = layer.router(h)
    p = layer.probabilities(h)
    ratio = torch.log(p[..., 0] / p[..., 1])  # n0 l0 - n1 l1
    low, high = bounds(logits, 0.25)
    assert ((ratio >= low - 1e-9) & (ratio <= high + 1e-9)).all()
    place = (ratio - low) / (high - low)
    assert place.min() < 0.1 < 0.9 < place.max()
    assert place.mean().item() == pytest.approx(0.5, abs=0.03)


def bounds(logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Least and greatest difference of the two logits after jitter."""
    middle, reach = logits[..., 0] - logits[..., 1], jitter * logits.abs().sum(dim=-1)
    return middle - reach, middle + reach


def test_jitter_repeats_with_seed_and_step_and_is_new_in_each_micro_batch_and_layer():
    h = random(2, 10, 32)
    config = with_routing(tiny_config("dtrnet-expert"), jitter=0.25)
    first, second = make_network(config), make_network(config)
    layers, again = first.layers[2:5], second.layers[2:5]
    for layer, other in zip(layers, again, strict=True):
        assert isinstance(layer, DtrLayer)
        start = layer.probabilities(h)
        assert torch.equal(layer.probabilities(h), start)
        torch.rand(3)  # the global generator has no part in it
        assert torch.equal(other.probabilities(h), start)
        layer(Stream(h))
        assert not torch.allclose(layer.probabilities(h), start)
        other.load.micro_batches = 1
        assert torch.equal(layer.probabilities(h), other.probabilities(h))
    layers[1].router = layers[0].router
    assert not torch.allclose(layers[0].probabilities(h), layers[1].probabilities(h)), (
        "two layers have the same noise"
    )


def test_jitter_is_of_the_sample_and_the_step_whatever_the_split():
    config, h = with_routing(tiny_config("dtrnet-token"), jitter=0.25), random(4, 10, 32)

    def layer(first_sample: int = 0) -> DtrLayer:
        context = dataclasses.replace(layer_context(config), first_sample=first_sample)
        return disturb(DtrLayer(context, 1, LossScale()), param_maker(config))

    def step(layer: DtrLayer, parts: tuple[Tensor, ...]) -> Tensor:
        found = [(layer.probabilities(part), layer(Stream(part)))[0] for part in parts]
        layer.load.end_step(layer.load.take_step_mean(), torch.tensor(1.0))
        return torch.cat(found)

    whole, halves, rank = layer(), layer(), layer(first_sample=2)
    first = step(whole, (h,))
    assert_close(step(halves, h.split(2)), first)
    assert_close(step(rank, h[2:].split(1)), first[2:])
    again = step(whole, (h,))
    assert_close(step(halves, h.split(1)), again)
    assert not torch.allclose(again, first), "each step has noise of its own"
    assert not torch.allclose(*whole.noise(h[:, :, :2].repeat(1, 1, 1)).split(2)), "and each sample"


def test_jitter_differs_between_seeds():
    h, config = random(2, 10, 32), with_routing(tiny_config("dtrnet-token"), jitter=0.25)
    contexts = [
        dataclasses.replace(layer_context(config), make=param_maker(config, seed=seed)) for seed in (1, 2)
    ]
    first, second = (DtrLayer(context, 1, LossScale()) for context in contexts)
    second.router = first.router
    assert not torch.allclose(first.probabilities(h), second.probabilities(h))


def test_there_is_no_jitter_in_evaluation():
    layer, plain, h = make_layer(jitter=0.25), make_layer(), random(2, 10, 32)
    assert not torch.allclose(layer.probabilities(h), plain.probabilities(h))
    with torch.no_grad():
        assert torch.equal(layer.probabilities(h), plain.probabilities(h))
    assert torch.equal(plain.probabilities(h), layer.router(h).softmax(dim=-1))


# ---- statistics ----------------------------------------------------------------------------------


def test_a_dtrnet_layers_statistics_equal_their_definitions():
    layer, h = make_layer(safe_min_attn_ratio=0.4), random(4, 10, 32, seed=2)
    layer.load.share = torch.tensor(0.3)
    logits = layer.router(h).detach()
    p, lead = logits.softmax(dim=-1)[..., 0], logits[..., 0] - logits[..., 1]
    _, mask, _ = layer.choice(lead, h)
    short = ((p > 0.5).sum(dim=1) < 4).sum().item()
    assert 0 < short < 4
    layer(Stream(h))
    fractions = mask.double().mean(dim=1).tolist()
    found = {name: value.item() for name, value in layer.monitor.read().items()}
    f = sum(fractions) / 4
    assert found == pytest.approx(
        {
            "routed_fraction": f,
            "routed_fraction_min": min(fractions),
            "routed_fraction_max": max(fractions),
            "f": f,
            "p0": p.mean().item(),
            "attention_loss": 0.3 * p.mean().item(),
            "refills": short / 4,
            "lambda": 0.1,
            "lead": lead.mean().item(),
            "lead_std": lead.std(correction=0).item(),
            "gate_routed": p[mask].mean().item(),
            "gate_routed_std": p[mask].std(correction=0).item(),
            "gate_unrouted": p[~mask].mean().item(),
            "gate_unrouted_std": p[~mask].std(correction=0).item(),
        },
        rel=1e-5,
    )
    assert layer.load.take_step_mean().item() == pytest.approx(f)
    with torch.no_grad():
        layer(Stream(h))
    with pytest.raises(AssertionError):
        layer.load.take_step_mean()
    assert layer.load.micro_batches == 0


@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_a_mod_layers_statistics_equal_their_definitions(gate):
    config = with_routing(tiny_config("mod-bce"), capacity=0.4, gate=gate)
    layer, h = (
        disturb(ModLayer(layer_context(config), 1, LossScale()), param_maker(config)),
        random(3, 10, 32),
    )
    r = (h @ layer.router.weight[0]).detach()
    top = torch.zeros(3, 10, dtype=torch.bool).scatter(1, r.topk(4, dim=1).indices, True)
    g = r.sigmoid() if gate == "sigmoid" else r
    layer(Stream(h))
    found = {name: value.item() for name, value in layer.monitor.read().items()}
    bce = -torch.where(top, r.sigmoid().log(), (-r).sigmoid().log()).mean().item()
    assert found == pytest.approx(
        {
            "routed_fraction": 0.4,
            "routed_fraction_min": 0.4,
            "routed_fraction_max": 0.4,
            "bce_loss": bce,
            "z_loss": (r * r).mean().item(),
            "logit": r.mean().item(),
            "logit_std": r.std(correction=0).item(),
            "causal_agreement": (top == (r > 0)).double().mean().item(),
            "causal_fraction": (r > 0).double().mean().item(),
            "gate_routed": g[top].mean().item(),
            "gate_routed_std": g[top].std(correction=0).item(),
            "gate_unrouted": g[~top].mean().item(),
            "gate_unrouted_std": g[~top].std(correction=0).item(),
        },
        rel=1e-5,
    )
