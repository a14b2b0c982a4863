"""What training does to DTF's router over thousands of steps must not end in NaN, nor in ties."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megadyn.kinds.dtf import Dtf
from megadyn.network import Network
from megadyn.routing.layer import LossScale
from megadyn.routing.select import choose_top
from megadyn.routing.surprise import SurpriseRouter, gate_of
from tests.helpers.networks import end_step, layer_context, with_routing
from tests.helpers.tiny import tiny_config, tiny_tokens


def router(**routing: float) -> SurpriseRouter:
    config = with_routing(tiny_config(), **routing)
    assert isinstance(config.model.routing, Dtf)
    return SurpriseRouter(
        "model.layers.0.router", layer_context(config, dtype=torch.float32), config.model.routing
    )


def surprises(mean: float, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """D_st around `mean` and a D_ch a tenth of it, [1, tokens], in float32."""
    spread = torch.rand(2, 1, tokens, generator=torch.Generator().manual_seed(0))
    return mean * (0.5 + spread[0]), 0.1 * mean * spread[1]


@pytest.mark.parametrize("mean", [0.01, 1.0, 20.0, 80.0, 1000.0])
def test_large_surprises_do_not_tie(mean):
    """Most gates round to 1 at 80, where ties would favour early tokens."""
    static, change = surprises(mean)
    score, _ = router()(static, change)
    assert score.dtype == torch.float32
    assert len(score.unique()) > 0.98 * score.numel()
    exact = router().double()(static.double(), change.double())[0]
    best, wanted = (choose_top(x, 256).places.tolist()[0] for x in (score, exact))
    assert len(set(best) & set(wanted)) >= 255
    if mean >= 80:
        assert (gate_of(score) == 1).float().mean() > 0.5


def test_the_gate_is_accurate_from_the_smallest_score_to_the_largest():
    score = torch.tensor([0.0, 1e-30, 1e-12, 1e-3, 1.0, 30.0, 1e4], requires_grad=True)
    gate = gate_of(score)
    assert_close(gate.double(), -torch.expm1(-score.detach().double()), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(gate.sum(), score)
    assert_close(grad, (-score.detach()).exp(), rtol=1e-6, atol=0)


def test_scores_and_gradients_are_finite_wherever_the_scalars_go():
    for log_offset in (-1000.0, -30.0, 30.0, 1000.0):
        for beta in (-200.0, 0.0, 200.0):
            layer = router(ce_log_offset_init=log_offset, beta_ce_init=beta, beta_cu_init=beta)
            static, change = (x.requires_grad_() for x in surprises(5.0))
            score, watched = layer(static, change)
            gate_of(score).sum().backward()
            found = [
                score,
                static.grad,
                change.grad,
                *watched.values(),
                *(p.grad for p in layer.parameters()),
            ]
            assert all(x.isfinite().all() for x in found), (log_offset, beta)


@torch.no_grad()
def descend(params: Iterable[Tensor], rate: float) -> None:
    """A step of `rate` against each gradient's sign: what Adam does where gradients keep their direction."""
    for param in params:
        param -= rate * param.grad.sign()
        param.grad = None


def test_a_gradient_that_keeps_lowering_the_offset_never_ends_in_nan():
    """The offset itself passed 0, and then its logarithm was NaN, at step 11."""
    layer, (static, change) = router(), surprises(0.5)
    for step in range(100):
        gate_of(layer(static, change)[0]).mean().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters()), step
        descend(layer.parameters(), 0.1)
    assert layer.ce_log_offset < -9
    assert gate_of(layer(static, change)[0]).mean() < 0.01


def test_a_network_whose_router_learns_fast_still_trains():
    """The offset itself gave NaN at step 26."""
    config = tiny_config("dtf")
    network = Network(layer_context(config, dtype=torch.float32), LossScale())
    scalars = [p for p in network.parameters() if ".router." in p.global_name]
    others = [p for p in network.parameters() if ".router." not in p.global_name]
    tokens = tiny_tokens(1)[0][:2]
    losses = []
    for step in range(40):
        loss = network(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        assert loss.isfinite(), step
        assert all(p.grad.isfinite().all() for p in network.parameters()), step
        descend(scalars, 0.2)
        descend(others, 3e-3)
        end_step(network)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
