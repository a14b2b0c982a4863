"""A step waits for the device nowhere in the model, unless tokens choose in any number: shown on tensors without values."""

from dataclasses import replace

import pytest
import torch

from megadyn.engine.loss_gate import LossGate
from megadyn.network import Network
from megadyn.parallel.grid import Axis
from megadyn.routing.layer import LossScale
from tests.helpers.networks import end_step, layer_context
from tests.helpers.tiny import KINDS, tiny_config


def step(kind: str, recompute: str = "none", **model: object) -> None:
    """Forward, backward behind the gate that spoils bad steps, and what follows, on the `meta` device,
    where whatever asks for a value, or for how many, raises."""
    ctx = layer_context(tiny_config(kind, recompute=recompute, **model), dtype=torch.float32)
    network = Network(replace(ctx, make=replace(ctx.make, device="meta")), LossScale())
    tokens = torch.empty(2, 25, dtype=torch.long, device="meta")
    gate = LossGate(1, Axis("dp"))
    gate(network(tokens[:, :-1], tokens[:, 1:])).backward()
    assert all(param.grad.device.type == "meta" for param in network.parameters())
    end_step(network)
    network(tokens[:, :-1], tokens[:, 1:]).backward()  # with what the first step left behind


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not tiny_config(kind).model.routing.varies])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_kind_that_chooses_a_fixed_number_waits(kind, recompute):
    step(kind, recompute)


@pytest.mark.parametrize("norm", ["lns", "hybridnorm"])
def test_no_normalisation_waits(norm):
    step("dtf", normalization=norm)


def test_token_choice_does_wait_for_the_number_of_tokens():
    with pytest.raises(NotImplementedError, match="nonzero"):
        step("dtrnet-token")
