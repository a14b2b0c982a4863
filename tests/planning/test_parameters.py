"""Counted parameters against those of built modules."""

from typing import Any

import pytest
import torch

from megadyn.model.block import LayerContext
from megadyn.network import layer_list
from megadyn.parallel.grid import Axis
from megadyn.parallel.params import ParamMaker
from megadyn.parallel.sharding import Sharding
from megadyn.planning.parameters import layer_parameters, stage_parameters, total_parameters
from megadyn.routing.layer import LossScale
from tests.helpers.networks import make_network
from tests.helpers.tiny import KINDS, tiny_config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"normalization": "hybridnorm"},
        {"qkv_bias": False, "tied": True, "head_dim": 6},
        {"qk_norm": True, "output_bias": True},
    ],
)
def test_the_whole_model_is_counted(kind: str, shape: dict[str, Any]) -> None:
    config = tiny_config(kind, **shape)
    network = make_network(config, dtype=torch.float32)
    assert total_parameters(config.model) == sum(param.numel() for param in network.parameters())
    assert stage_parameters(config.model, 1, [0, config.model.num_layers]) == [total_parameters(config.model)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", [2, 4])
def test_a_tensor_ranks_parts_are_counted(kind: str, tensor: int) -> None:
    """Two key/value heads: cut over two ranks, whole on four. A vocabulary of 61 is padded."""
    config = tiny_config(kind)
    model, cuts = config.model, [0, 1, 4]
    make = ParamMaker(Sharding(tensor, 2), 1, Axis("tp", 1, tensor), device="meta")
    built = [
        sum(p.numel() for p in part.build(*part.arguments).parameters())
        for part in layer_list(LayerContext(model, make), LossScale())
    ]
    assert layer_parameters(model, tensor) == built[1:-2]
    assert stage_parameters(model, tensor, cuts) == [sum(built[:2]), sum(built[2:])]


def test_a_tied_embedding_stands_on_both_ends() -> None:
    tied, untied = (tiny_config("dense", tied=tied).model for tied in (True, False))
    assert stage_parameters(tied, 1, [0, 2, 4]) == stage_parameters(untied, 1, [0, 2, 4])
    assert total_parameters(untied) - total_parameters(tied) == 61 * 32
