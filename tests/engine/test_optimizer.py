"""Parameter groups, the learning rate over a run, and gradient clipping."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from megadyn.config import MultipliersConfig, OptimizerConfig
from megadyn.engine.engine import set_learning_rate
from megadyn.engine.optimizer import (
    GradientClipper,
    component,
    group_key,
    learning_rate,
    make_optimizer,
    refuse_unmatched,
)
from megadyn.errors import ConfigError
from megadyn.parallel.grid import Axis, Grid
from tests.helpers.networks import make_network
from tests.helpers.tiny import tiny_config, tiny_tokens

RATE, LEAST = 1e-3, 1e-4


def schedule(name: str, iterations: int = 50, **changes) -> list[float]:
    fields = {"learning_rate": RATE, "min_learning_rate": LEAST, "warmup_iterations": 10} | changes
    return [learning_rate(OptimizerConfig(schedule=name, **fields), i, iterations) for i in range(iterations)]


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("model.layers.0.router.beta_ce", "router"),
        ("model.layers.3.causal_router.threshold", "router"),
        ("model.layers.0.prior.gate_proj.weight", "prior"),
        ("model.layers.0.prior.norm.weight", "prior"),
        ("model.layers.0.mlp.gate_proj.weight", "base"),
        ("model.embed_tokens.weight", "base"),
        ("lm_head.weight", "base"),
    ],
)
def test_a_parameters_component_is_read_from_its_name(name, want):
    assert component(name) == want


def test_groups_are_cut_by_component_and_by_whether_weights_decay():
    config = tiny_config()
    network = make_network(config, dtype=torch.float32)
    optimizer = make_optimizer(network, config.optimizer)
    names = {id(p): p.global_name for p in network.parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            seen[names[id(param)]] = (group["component"], group["weight_decay"])
    assert seen.keys() == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    layer = "model.layers.0"
    assert seen[f"{layer}.mlp.gate_proj.weight"] == ("base", 0.1)
    assert seen["model.embed_tokens.weight"] == ("base", 0.1)
    assert seen[f"{layer}.self_attn.q_proj.bias"] == ("base", 0.0)
    assert seen[f"{layer}.input_layernorm.weight"] == ("base", 0.0)
    assert seen[f"{layer}.router.beta_ce"] == ("router", 0.0)
    assert seen[f"{layer}.prior.norm.weight"] == ("prior", 0.0)
    assert seen[f"{layer}.prior.down_proj.weight"] == ("prior", 0.1)
    assert {(g["component"], g["weight_decay"]) for g in optimizer.param_groups} == {
        ("base", 0.0),
        ("base", 0.1),
        ("prior", 0.0),
        ("prior", 0.1),
        ("router", 0.0),
    }
    assert len({group_key(p, config.optimizer) for p in network.parameters()}) == len(optimizer.param_groups)


def test_rates_and_freezing_go_by_name():
    config = tiny_config("dense")
    config.optimizer.freeze = ["model.embed_tokens.*"]
    config.optimizer.rates = {"*.layers.1.*": 3.0, "*.mlp.*": 0.5}
    network = make_network(config, dtype=torch.float32)
    refuse_unmatched(network, config.optimizer, Axis("pp"))
    seen = {}
    for group in make_optimizer(network, config.optimizer).param_groups:
        for param in group["params"]:
            seen[param.global_name] = (group["component"], group["lr_multiplier"], group["weight_decay"])
    assert seen["model.embed_tokens.weight"] == ("base x 0", 0.0, 0.0)
    assert seen["model.layers.1.mlp.up_proj.weight"] == ("base x 3", 3.0, 0.1)
    assert seen["model.layers.0.mlp.up_proj.weight"] == ("base x 0.5", 0.5, 0.1)
    assert seen["lm_head.weight"] == ("base", 1.0, 0.1)


@pytest.mark.parametrize(
    ("freeze", "rates", "said"),
    [
        (
            ["model.embed.*"],
            {},
            r"optimizer\.freeze = 'model\.embed\.\*': must be a pattern that matches a tensor",
        ),
        (
            [],
            {"*": 0.5, "lm_head.*": 2.0},
            r"optimizer\.rates = 'lm_head\.\*': .* no pattern before it matches",
        ),
        (["lm_head.*"], {"lm_head.*": 2.0}, r"optimizer\.rates = 'lm_head\.\*': .* is not frozen"),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(freeze, rates, said):
    config = tiny_config("dense")
    config.optimizer.freeze, config.optimizer.rates = freeze, rates
    with pytest.raises(ConfigError, match=said):
        refuse_unmatched(make_network(config), config.optimizer, Axis("pp"))


def test_a_tied_embedding_stands_in_one_group_once():
    config = tiny_config(tied=True)
    network = make_network(config, dtype=torch.float32)
    optimizer = make_optimizer(network, config.optimizer)
    params = [p.global_name for group in optimizer.param_groups for p in group["params"]]
    assert params.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in params


def test_multipliers_scale_the_rate_of_their_component():
    config = tiny_config()
    config.optimizer.multipliers, config.optimizer.eps = (
        MultipliersConfig(base=1.0, router=5.0, prior=0.25),
        1e-20,
    )
    network = make_network(config, dtype=torch.float32)
    optimizer = make_optimizer(network, config.optimizer)
    set_learning_rate(optimizer, 2e-3)
    rates = {group["component"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"base": 2e-3, "router": 1e-2, "prior": 5e-4})

    # AdamW's first step without decay moves every weight by its rate: the multiplier reaches the weights.
    before = {p.global_name: p.detach().clone() for p in network.parameters()}
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    for name, want in (("router.beta_ce", 1e-2), ("prior.norm.weight", 5e-4), ("mlp.gate_proj.weight", None)):
        param = next(p for p in network.parameters() if p.global_name == f"model.layers.0.{name}")
        moved = (param.detach() - before[param.global_name]).abs()
        if want is not None:
            torch.testing.assert_close(moved, torch.full_like(moved, want), rtol=1e-2, atol=0)
        else:
            assert moved.max() < 2e-3 * (1 + 0.1) * 1.01


def test_the_optimizer_takes_its_numbers_from_the_configuration():
    config = tiny_config()
    config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps = 0.8, 0.91, 1e-7
    optimizer = make_optimizer(make_network(config, dtype=torch.float32), config.optimizer)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.91), 1e-7)}


# ---- learning rate -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_the_warm_up_rises_in_equal_steps_to_the_full_rate(name):
    rates = schedule(name)
    assert rates[:10] == pytest.approx([RATE * (i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_last_step_runs_at_the_least_rate(name):
    rates = schedule(name)
    assert rates[-1] == pytest.approx(LEAST)
    assert rates[-2] > LEAST * 1.001


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(
    "changes", [{}, {"warmup_iterations": 0}, {"decay_iterations": 17}, {"iterations": 3}, {"iterations": 1}]
)
def test_after_the_warm_up_the_rate_never_rises_nor_leaves_its_bounds(name, changes):
    rates = schedule(name, **changes)
    after = rates[changes.get("warmup_iterations", 10) :]
    assert all(b <= a + 1e-18 for a, b in pairwise(after))
    assert all(LEAST - 1e-18 <= rate <= RATE + 1e-18 for rate in after)
    assert all(0 < rate <= RATE for rate in rates)


def test_cosine_is_half_way_down_in_the_middle():
    rates = schedule("cosine")
    assert rates[29] == pytest.approx((RATE + LEAST) / 2)  # 20 of the 40 steps behind the warm-up
    assert rates[19] == pytest.approx(LEAST + (RATE - LEAST) * (1 + math.cos(math.pi / 4)) / 2)


def test_linear_falls_in_equal_steps():
    drops = [a - b for a, b in pairwise(schedule("linear")[9:])]
    assert drops == pytest.approx([(RATE - LEAST) / 40] * 40)


def test_constant_stays():
    assert schedule("constant")[10:] == [RATE] * 40


@pytest.mark.parametrize(("decay", "length"), [(None, 5), (12, 12)])
def test_wsd_is_stable_and_then_falls_in_equal_steps(decay, length):
    rates = schedule("wsd", decay_iterations=decay)
    assert rates[9 : 50 - length] == [RATE] * (41 - length)
    assert [a - b for a, b in pairwise(rates[-length - 1 :])] == pytest.approx(
        [(RATE - LEAST) / length] * length
    )


def test_the_final_decay_has_three_shapes():
    rates = {
        shape: schedule("wsd", decay_iterations=20, decay_shape=shape)
        for shape in ("linear", "cosine", "sqrt")
    }
    for shape, of_step in rates.items():
        assert of_step[29] == RATE and of_step[49] == pytest.approx(LEAST)
        assert all(a > b for a, b in pairwise(of_step[29:])), shape
        left = {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - math.sqrt(0.5)}[shape]
        assert of_step[39] == pytest.approx(LEAST + (RATE - LEAST) * left)  # ten of twenty steps on


def test_a_wsd_decay_longer_than_the_run_starts_behind_the_warm_up():
    assert schedule("wsd", decay_iterations=400) == pytest.approx(schedule("linear"))


# ---- clipping ------------------------------------------------------------------------------------


def marked_module(scale: float) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3))
    for number, param in enumerate(module.parameters()):
        param.tensor_model_parallel = number % 2 == 0
        if number < 5:  # the last stays without a gradient
            param.grad = torch.randn_like(param) * scale
    return module


@pytest.mark.parametrize(("scale", "max_norm"), [(1.0, 0.5), (10.0, 1.0), (1e-3, 1.0), (1.0, 0.0)])
def test_clipping_alone_equals_torchs(scale, max_norm):
    ours, theirs = marked_module(scale), marked_module(scale)
    clipper = GradientClipper(ours, max_norm, Grid())
    clipper()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm if max_norm else math.inf)
    torch.testing.assert_close(clipper.norm, norm)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        if reference.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, reference.grad)
    changed = not torch.equal(ours[0].weight.grad, marked_module(scale)[0].weight.grad)
    assert changed == (0 < max_norm < norm)


def test_clipping_runs_before_every_step_when_hooked():
    module = marked_module(100.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
    optimizer.register_step_pre_hook(GradientClipper(module, 1.0, Grid()))
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in module.parameters()]) - before
    torch.testing.assert_close(moved.norm(), torch.tensor(1.0), rtol=1e-4, atol=0)
