"""The controller that holds a DTRNet layer's share of attending tokens at `model.routing.target_share`."""

import statistics

import pytest
import torch

from megadyn.errors import ConfigError
from megadyn.kinds import make_kind
from megadyn.kinds.dtrnet.load import AttentionLoad
from megadyn.kinds.dtrnet.share import (
    FAR,
    INTEGRAL,
    LARGEST,
    PROPORTIONAL,
    PULL,
    SOFT,
    ShareController,
    excess,
    preference,
)
from megadyn.routing.choice import TwoLayerRouter
from megadyn.telemetry.router_health import planned_share
from tests.helpers.networks import disturb, layer_context, param_maker, with_routing
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")


def test_lambda_is_a_proportional_and_an_integral_part_of_the_relative_error() -> None:
    controller, rest = ShareController(0.1, 0.002, 0.1), 0.002
    for share, rate in ((0.2, 0.5), (0.05, 0.1), (0.1, 0.3)):
        controller.end_step(torch.tensor(share), rate)
        error = share / 0.1 - 1
        rest += INTEGRAL * rate * error
        assert controller.rest.item() == pytest.approx(rest, rel=1e-5)
        assert controller.value.item() == pytest.approx(rest + PROPORTIONAL * error, rel=1e-5)


@pytest.mark.parametrize(("share", "sign"), [(0.0, -1), (1.0, 1)])
def test_lambda_stays_within_its_bounds_and_finite(share: float, sign: int) -> None:
    controller = ShareController(0.1, 0.0, 0.03)
    controller.end_step(torch.tensor(share), 1e-9)
    assert controller.value.item() == pytest.approx(PROPORTIONAL * (LARGEST if sign > 0 else -1), rel=1e-5)
    for _ in range(10):
        controller.end_step(torch.tensor(share), 1.0)
    assert controller.value.item() == controller.rest.item() == pytest.approx(sign * 0.03)


def test_the_preference_has_a_gradient_where_p0_has_none() -> None:
    lead = torch.tensor([[-200.0, -1.0, 0.0, 3.0, 200.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(preference(lead), lead)
    torch.testing.assert_close(slope, SOFT / (SOFT + lead.detach().abs()).square() / 5)
    (saturated,) = torch.autograd.grad(
        torch.stack((lead, torch.zeros_like(lead)), dim=-1).softmax(dim=-1)[..., 0].sum(), lead
    )
    assert saturated[0, [0, -1]].tolist() == [0, 0], "or the preference would not be needed"


def test_only_far_logits_are_pulled_back() -> None:
    lead = torch.tensor([[-FAR - 3, -FAR, 0.0, 5.0, FAR + 2]])
    assert excess(lead).item() == pytest.approx(PULL * (9 + 4) / 5)


def test_a_load_with_a_controller_has_a_lambda_of_its_own_and_equal_parts() -> None:
    loads = [AttentionLoad(2, 0.05, 0, ShareController(0.2, 0.05, 0.1)) for _ in range(2)]
    assert [load.loss(torch.tensor(0.6)).item() for load in loads] == pytest.approx([0.05 / 2 * 0.6] * 2)
    for load, share in zip(loads, (0.4, 0.1)):
        load.end_step(torch.tensor(share), torch.tensor(0.5), 0.02)
    gain = PROPORTIONAL + INTEGRAL * 0.02
    assert [load.loss(torch.tensor(0.6)).item() for load in loads] == pytest.approx(
        [(0.05 + error * gain) / 2 * 0.6 for error in (1.0, -0.5)], rel=1e-5
    )


def test_a_restored_controller_goes_on_bit_for_bit() -> None:
    load, again = (AttentionLoad(2, 0.01, 0, ShareController(0.1, 0.01, 0.1)) for _ in range(2))
    load.end_step(torch.tensor(0.7), torch.tensor(1.0), 0.02)
    again.set_state(load.state(), CPU)
    for tracker in (load, again):
        tracker.end_step(torch.tensor(0.3), torch.tensor(0.9), 0.02)
    assert again.state() == load.state()


def test_a_state_of_a_run_without_a_target_leaves_the_start() -> None:
    load = AttentionLoad(2, 0.01, 0, ShareController(0.1, 0.01, 0.1))
    load.set_state(AttentionLoad(2, 0.01, 0).state(), CPU)
    assert load.value.item() == pytest.approx(0.01)


def last_shares(
    shift: float, push: float, target: float = 0.2, rate: float = 0.02, steps: int = 400
) -> list[float]:
    """Shares in the last quarter of a training of one router alone, which begins with logit differences near `shift`; the
    language-model loss is stood in for by `push` mean p0. The tokens are new in each step."""
    config = tiny_config("dtrnet-token", init_std=0.02)
    router = TwoLayerRouter("model.layers.1.router", layer_context(config, dtype=torch.float32), 16, 2)
    disturb(router, param_maker(config))
    load = AttentionLoad(1, 1e-3, 0, ShareController(target, 1e-3, 0.1))
    with torch.no_grad():
        router.fc2.bias[0] += shift
    optimizer = torch.optim.AdamW(router.parameters(), lr=rate, betas=(0.9, 0.95))
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        logits = router(torch.randn(8, 64, 32, generator=generator))
        lead = logits[..., 0] - logits[..., 1]
        optimizer.zero_grad()
        (load.loss(load.pushed(lead)) + excess(lead) + push * lead.sigmoid().mean()).backward()
        optimizer.step()
        share = (lead.detach() > 0).float().mean()
        load.end_step(share, share, rate)
        shares.append(share.item())
    assert abs(load.value.item()) <= 0.1
    return shares[-steps // 4 :]


@pytest.mark.parametrize("push", [-5e-3, 5e-3])
@pytest.mark.parametrize("shift", [-25.0, 25.0])
def test_the_share_reaches_its_target_from_where_p0_is_saturated(shift: float, push: float) -> None:
    """From no token and from all, whichever way the other losses push, with a router that learns ten times as fast."""
    shares = last_shares(shift, push)
    assert statistics.fmean(shares) == pytest.approx(0.2, rel=0.35)
    assert min(shares) > 0.02
    assert max(shares) < 0.6


@pytest.mark.parametrize(
    ("fields", "key", "want"),
    [
        ({"kind": "mod"}, "target_share", "left out: routing kind mod has no such key"),
        ({"router_type": "expert_choice"}, "target_share", "left out without token choice"),
        ({"target_share": 0.0}, "target_share", "in \\[0.001, 1\\]"),
        ({"target_share": 1.5}, "target_share", "in \\[0.001, 1\\]"),
        (
            {"target_share": 0.1, "safe_min_attn_ratio": 0.2},
            "target_share",
            "at least model.routing.safe_min_attn_ratio = 0.2",
        ),
        ({"aux_loss_warmup": 10}, "aux_loss_warmup", "0 with model.routing.target_share"),
        ({"aux_loss_lambda": 0.5}, "aux_loss_lambda", "at most model.routing.aux_loss_lambda_limit = 0.1"),
    ],
)
def test_what_cannot_be_held_is_refused(fields: dict, key: str, want: str) -> None:
    with pytest.raises(ConfigError, match=f"model.routing.{key} = .*{want}"):
        make_kind(**{"kind": "dtrnet", "target_share": 0.3} | fields)


def test_the_plan_is_of_the_target() -> None:
    routing = make_kind("dtrnet", capacity=0.1, target_share=0.3)
    assert routing.share == 0.3
    assert make_kind("dtrnet", capacity=0.1).share == 0.1
    assert make_kind("dense").share == 1.0
    config = with_routing(tiny_config("dtrnet-token"), target_share=0.3, aux_loss_warmup=0)
    assert planned_share(config) == 0.3, "what a strayed share is held against"
