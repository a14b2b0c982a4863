"""Operations that are planned with, against those that torch counts in a real forward pass."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadyn.config import Config
from megadyn.costs.operations import block_flops
from megadyn.planning.flops import head_flops, layer_costs, layer_flops, training_flops
from megadyn.routing.choice import TwoLayerRouter
from tests.helpers.networks import known, make_network, with_routing
from tests.helpers.tiny import KINDS, tiny_config, tiny_tokens

BATCH = 3


def uncounted_attention(config: Config, tokens: int) -> float:
    """torch counts a causal attention's whole square of scores, the plan its lower half."""
    model = config.model
    return 2 * 2 * tokens * tokens * model.num_heads * model.head_dim / 2


def counted(config: Config, length: int, training: bool = False) -> int:
    network = make_network(config, dtype=torch.float32)
    tokens, labels = (
        part.contiguous() for part in tiny_tokens(1, BATCH, length)[0].unfold(1, length, 1).unbind(1)
    )
    # torch's own counter knows nothing of the fused attention for CPUs, and would count it as free.
    with (
        torch.set_grad_enabled(training),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        if training:
            network(tokens, labels).backward()
        else:
            network(tokens)
    return counter.get_total_flops()


def fix_share(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """Under token choice as many tokens attend as the configured capacity says: those with the highest p0."""
    forward = TwoLayerRouter.forward

    def shifted(self: TwoLayerRouter, hidden: Tensor) -> Tensor:
        logits = forward(self, hidden)
        lead = (logits[..., 0] - logits[..., 1]).detach()
        count = max(1, int(config.model.routing.share * lead.shape[1]))
        highest = lead.sort(dim=1, descending=True).values
        middle = (highest[:, count - 1] + highest[:, count]) / 2
        return logits + torch.stack([torch.zeros_like(lead), middle.unsqueeze(1).expand_as(lead)], dim=-1)

    if config.model.routing.varies:
        monkeypatch.setattr(TwoLayerRouter, "forward", shifted)


def unseen_scores(config: Config, length: int) -> float:
    """Of all layers, on one sequence."""
    kept = max(1, int(config.model.routing.share * length))
    return sum(
        uncounted_attention(config, length if layer in ("dense", "dtf_decision", "stt") else kept)
        for layer in config.model.layer_types
    )


FREE = ("mod-threshold", "nested", "subskip", "skip_middle")
"""How many tokens these process follows from their weights and averages, not from their capacity: the conformance suite counts
them at the shares that it finds."""
ROUTED = [(kind, capacity) for kind in KINDS if kind not in ("dense", *FREE) for capacity in (0.125, 0.5)]


@pytest.mark.parametrize(
    ("kind", "capacity", "norm"),
    [
        ("dense", 1.0, "pre"),
        *((*x, "pre") for x in ROUTED),
        ("mod", 0.25, "hybridnorm"),
        ("dtrnet-token", 0.25, "hybridnorm"),
    ],
)
@pytest.mark.parametrize("length", [24, 150])
def test_a_forward_pass_costs_what_is_planned(monkeypatch, kind, capacity, norm, length):
    config = tiny_config(kind, normalization=norm)
    config = with_routing(config, **known(config, capacity=capacity, prior_factor=0.5))
    fix_share(monkeypatch, config)
    model = config.model
    plan = sum(layer_costs(model, length)) + head_flops(model, length) + unseen_scores(config, length)
    assert counted(config, length) == pytest.approx(BATCH * plan, rel=0.01)


@pytest.mark.parametrize(("kind", "capacity"), [("dense", 1.0), *ROUTED])
def test_forward_and_backward_cost_what_is_planned(monkeypatch, kind, capacity):
    config = tiny_config(kind)
    config = with_routing(config, **known(config, capacity=capacity))
    fix_share(monkeypatch, config)
    plan = training_flops(config.model, 150) + 3 * unseen_scores(config, 150)
    assert counted(config, 150, training=True) == pytest.approx(BATCH * plan, rel=0.01)


@pytest.mark.parametrize("router_type", ["token_choice", "expert_choice"])
def test_a_dtrnet_layer_saves_queries_keys_and_scores_alone(router_type):
    """By hand: width 8, two heads of 4, one key/value head, a router of inner width 4."""
    model = with_routing(
        tiny_config("dtrnet-token", hidden_size=8, num_heads=2, num_kv_heads=1, ffn_size=12, qkv_bias=False),
        capacity=0.3,
        router_type=router_type,
        layout="D4",
    ).model
    q, k, v, o, mlp, router = 8 * 8, 8 * 4, 8 * 4, 8 * 8, 3 * 8 * 12, 8 * 4 + 4 * 2
    attending, scores = 3, 2 * 3 * 3 * 8 / 2
    assert layer_costs(model, 10) == [2 * (10 * (v + o + mlp + router) + attending * (q + k) + scores)] * 4


def test_a_mod_layer_is_counted_by_hand():
    model = with_routing(
        tiny_config("mod-predictor", hidden_size=8, num_heads=2, num_kv_heads=1, ffn_size=12, qkv_bias=False),
        capacity=0.3,
    ).model
    block, router, predictor = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12, 8, 8 * 4 + 4
    assert layer_costs(model, 10)[1] == 2 * (3 * block + 2 * 3 * 3 * 8 / 2 + 10 * (router + predictor))


@pytest.mark.parametrize("kind", ["dense", "mod"])
def test_a_window_leaves_the_scores_that_it_sees(kind):
    """Of a routed layer's tokens, spread evenly, it sees the same share."""
    length, size = 1000, 200
    whole, some = (
        layer_flops(tiny_config(kind, **window).model, length)
        for window in ({}, {"sliding_window": size, "window_layers": [1, 2]})
    )
    seen = sum(min(t + 1, size) for t in range(length)) / sum(t + 1 for t in range(length))
    assert (some[0], some[3]) == (whole[0], whole[3])
    for layer in (1, 2):
        assert some[layer].attention / whole[layer].attention == pytest.approx(seen, rel=0.01)
        assert some[layer].total - whole[layer].total == pytest.approx(
            some[layer].attention - whole[layer].attention
        )
    assert layer_flops(tiny_config(kind, sliding_window=length).model, length) == whole


def test_a_skipping_layer_costs_less_than_its_capacity_for_attention_is_quadratic():
    config = with_routing(tiny_config("dtf"), capacity=0.25)
    dense, dynamic = block_flops(config.model, 400), layer_costs(config.model, 400)[1]
    assert dynamic == block_flops(config.model, 100)
    assert dynamic < 0.25 * dense


def test_a_training_step_costs_three_forward_passes():
    model = tiny_config("dtf").model
    assert training_flops(model, 24) == pytest.approx(
        3 * (sum(layer_costs(model, 24)) + head_flops(model, 24))
    )


def test_a_dense_layer_is_counted_by_hand():
    model = tiny_config(
        "dense", hidden_size=8, num_heads=2, num_kv_heads=1, ffn_size=12, qkv_bias=False
    ).model
    tokens, q, k, v, o, mlp = 10, 8 * 8, 8 * 4, 8 * 4, 8 * 8, 3 * 8 * 12
    # scores and values: two products of [T, T] with 8 columns, half of them seen
    attention = 2 * 10 * 10 * 8 / 2
    assert block_flops(model, tokens) == 2 * tokens * (q + k + v + o + mlp) + 2 * attention


@pytest.mark.parametrize("kind", KINDS)
def test_what_tensor_ranks_share_and_what_each_does_add_up(kind):
    config = tiny_config(kind)
    flops = layer_flops(config.model, 24)
    assert [layer.cut + layer.whole for layer in flops] == layer_costs(config.model, 24)
    routers = [
        layer in ("dtf_decision", "mod", "dtrnet", "stt", "nested", "subskip")
        or (layer == "dtf_dynamic" and kind == "dtf-predictor")
        or (kind == "skip_middle" and index < 2)
        for index, layer in enumerate(config.model.layer_types)
    ]
    assert [layer.whole > 0 for layer in flops] == routers
