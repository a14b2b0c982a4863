"""Muon on one process: its update against float64, which parameters it takes, and how matrices are divided among ranks."""

import math

import pytest
import torch
from torch import nn

from megadyn.config import MuonConfig
from megadyn.engine.engine import set_learning_rate
from megadyn.engine.muon import MUON, Held, Muon, cost_of, in_rounds, orthogonalised, owners_of
from megadyn.engine.optimizer import make_optimizer
from megadyn.engine.placement import Place
from megadyn.parallel.grid import Grid
from megadyn.parallel.params import mark, name_of
from megadyn.parallel.sharding import Sharding
from megadyn.parallel.whole import Matrix, Stage
from tests.helpers.networks import make_network
from tests.helpers.plain_muon import made_orthogonal, muon_step
from tests.helpers.tiny import KINDS, VARIANTS, tiny_config

ALONE = Stage(Grid(), Sharding(1, 2), None, True, torch.device("cpu"))
SHAPES = [(8, 8), (6, 20), (20, 6), (1, 7)]


def attached(module: nn.Module, dtype: torch.dtype = torch.float64, **settings: float) -> Muon:
    config = tiny_config("dense")
    config.optimizer.name = "muon"
    for key, value in settings.items():
        setattr(config.optimizer.muon, key, value)
    optimizer = make_optimizer(module, config.optimizer)
    assert isinstance(optimizer, Muon)
    optimizer.attach(optimizer, 0, ALONE, dtype)
    return optimizer


def matrices(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Of SHAPES, with gradients, and a vector."""
    module = nn.Module()
    draw = torch.Generator().manual_seed(3)
    for number, shape in enumerate([*SHAPES, (5,)]):
        param = nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype))
        param.grad = torch.randn(shape, generator=draw, dtype=dtype)
        module.register_parameter(f"p{number}", mark(param, f"model.layers.0.mlp.{number}", is_cut=False))
    return module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_the_iteration_moves_the_singular_values_alone(shape: tuple[int, int], steps: int) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e3
    torch.testing.assert_close(orthogonalised(update, steps), made_orthogonal(update, steps))


def test_five_steps_bring_them_near_one() -> None:
    update = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalised(update, 5))
    assert values.min() > 0.6 and values.max() < 1.25
    half = orthogonalised(update.bfloat16(), 5)
    assert half.dtype == torch.bfloat16
    assert (half.float() - orthogonalised(update, 5)).norm() < 0.05 * values.norm()


def test_steps_are_those_of_the_float64_reference() -> None:
    module = matrices()
    optimizer = attached(module, momentum=0.9, multiplier=0.5, steps=4)
    want = {
        param: (param.detach().clone(), torch.zeros_like(param))
        for param in module.parameters()
        if param.ndim == 2
    }
    vector = nn.Parameter(module.p4.detach().clone())
    adam = torch.optim.AdamW([vector], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        set_learning_rate(optimizer, 0.1)
        for param in module.parameters():
            param.grad = param.grad.roll(step)
        want = {
            param: muon_step(*of, rate=0.05, decay=0.1, mu=0.9, steps=4)
            for param, of in ((p, (w, p.grad, m)) for p, (w, m) in want.items())
        }
        vector.grad = module.p4.grad
        optimizer.step()
        adam.step()
        torch.testing.assert_close(module.p4, vector)
        for param, (weight, momentum) in want.items():
            torch.testing.assert_close(param.detach(), weight)
            torch.testing.assert_close(optimizer.state[param]["momentum"], momentum)


def test_an_update_is_as_large_as_adamws() -> None:
    """A root mean square of 0.2 times the rate, for every shape, whatever the gradient's size."""
    module = matrices(torch.float32)
    for param in module.parameters():
        param.grad *= 1e-4
    before = [param.detach().clone() for param in module.parameters()]
    optimizer = attached(module, torch.float32)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    for param, was in zip(module.parameters(), before, strict=True):
        if param.ndim == 2:
            moved = (param.detach() - was).square().mean().sqrt()
            assert moved == pytest.approx(0.2e-2, rel=0.35)


def test_without_a_gradient_or_a_rate_nothing_is_nan_and_nothing_moves() -> None:
    module = matrices(torch.float32)
    for param in module.parameters():
        param.grad = None
    before = [param.detach().clone() for param in module.parameters()]
    optimizer = attached(module, torch.float32)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(param, was) for param, was in zip(module.parameters(), before, strict=True))
    # The gradient was not lost: a frozen matrix keeps its momentum, as under AdamW.
    assert torch.equal(optimizer.state[module.p0]["momentum"], torch.ones(8, 8))


def test_an_overflow_changes_no_state() -> None:
    module = matrices(torch.float32)
    optimizer = attached(module, torch.float32)
    optimizer.overflow = True
    optimizer.step()
    assert not optimizer.state[module.p0] and not optimizer.state[module.p4]


@pytest.mark.parametrize("kind", [*KINDS, *VARIANTS])
def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(kind: str) -> None:
    config = tiny_config(kind)
    config.optimizer.name = "muon"
    network = make_network(config, dtype=torch.float32)
    for group in make_optimizer(network, config.optimizer).param_groups:
        for param in group["params"]:
            name = name_of(param)
            wanted = name.endswith("_proj.weight") and ".prior." not in name
            assert (group["algorithm"] == MUON) == wanted, name
            assert group["component"].startswith("muon") == wanted


def test_rates_multiply_and_frozen_matrices_stay_muons() -> None:
    config = tiny_config("dense")
    config.optimizer.name, config.optimizer.muon = "muon", MuonConfig(multiplier=0.5)
    config.optimizer.multipliers.base = 2.0
    config.optimizer.rates, config.optimizer.freeze = {"*.mlp.*": 3.0}, ["*.layers.1.*"]
    found = {}
    for group in make_optimizer(make_network(config, dtype=torch.float32), config.optimizer).param_groups:
        for param in group["params"]:
            found[name_of(param)] = group["component"], group["lr_multiplier"], group["weight_decay"]
    assert found["model.layers.0.mlp.up_proj.weight"] == ("muon x 3", 3.0, 0.1)
    assert found["model.layers.0.self_attn.q_proj.weight"] == ("muon", 1.0, 0.1)
    assert found["model.layers.1.self_attn.q_proj.weight"] == ("muon x 0", 0.0, 0.0)
    assert found["model.embed_tokens.weight"] == ("base", 2.0, 0.1)


# ---- who does what -------------------------------------------------------------------------------


def held(*shapes: tuple[int, int]) -> list[Held]:
    return [
        Held(Matrix(str(number), shape, shape, ((0, math.prod(shape)),)), Place(None, 0, 0, 0))
        for number, shape in enumerate(shapes)
    ]


def test_rounds_hold_every_matrix_once_and_about_one_per_rank() -> None:
    layer = [(64, 64), (16, 64), (16, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
    all_held = held(*layer * 5)
    rounds = list(in_rounds(all_held, 4, 5))
    assert sorted(one.matrix.name for some in rounds for one in some) == sorted(
        one.matrix.name for one in all_held
    )
    assert all(sum(one.matrix.elements for one in some) <= 4 * 64 * 192 for some in rounds)
    # The largest come first, four to a round, so that each of four ranks makes one.
    assert [len(some) for some in rounds[:3]] == [4, 4, 4]
    work = [0.0] * 4
    for some in rounds:
        costs = [cost_of(one.matrix, 5) for one in some]
        for owner, cost in zip(owners_of(costs, 4), costs, strict=True):
            work[owner] += cost
    assert max(work) < 1.25 * sum(work) / 4


def test_without_matrices_there_are_no_rounds() -> None:
    assert list(in_rounds([], 4, 5)) == []
