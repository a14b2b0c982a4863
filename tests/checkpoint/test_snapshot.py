"""What a snapshot asks of the device: whether numbers are finite is found out there, not on one core of the host."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megadyn.checkpoint import save_load
from megadyn.parallel.grid import Grid
from megadyn.parallel.params import mark

NAMES = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight")


class Access:
    """In the place of an optimizer's states."""

    def __init__(self, engine):
        self.known = engine.known

    def states(self, param):
        return ("exp_avg",)

    def get(self, param):
        return {"weight": param.detach(), "exp_avg": self.known[param.global_name]}


def engine_with(moments: dict[str, torch.Tensor]) -> SimpleNamespace:
    params = [mark(nn.Parameter(torch.ones(3)), name, is_cut=False) for name in NAMES]
    return SimpleNamespace(
        grid=Grid(), device=torch.device("cpu"), known=moments, parameters=lambda: params, params=params
    )


@pytest.fixture
def checked(monkeypatch) -> list[int]:
    """Where the tensors lie that were looked through."""
    monkeypatch.setattr(save_load, "OptimizerAccess", Access)
    known, found = torch.Tensor.isfinite, []
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: (found.append(x.data_ptr()), known(x))[1])
    return found


def test_the_engines_own_tensors_are_looked_through_not_their_copies(checked):
    engine = engine_with({name: torch.zeros(3) for name in NAMES})
    shards, bad = save_load._shards(engine)
    own = [x.data_ptr() for param in engine.params for x in (param, engine.known[param.global_name])]
    copies = {x.data_ptr() for tensors in shards.values() for x in tensors.values()}
    assert (checked, bad) == (own, None)
    assert len(copies) == 4 and not copies & set(own)


@pytest.mark.parametrize(
    ("number", "where"), [(torch.nan, NAMES[0]), (torch.inf, NAMES[1]), (-torch.inf, NAMES[1])]
)
def test_the_first_tensor_that_is_not_finite_is_named(checked, number, where):
    moments = {name: torch.zeros(3) for name in NAMES}
    moments[where][1] = number
    assert save_load._shards(engine_with(moments))[1] == f"{where}/exp_avg"
