"""Wherever training drives a router, its scores, gates, losses and gradients stay finite, in the exported model too."""

import pytest
import torch

from megadyn.network import routed_layers
from tests.helpers.networks import known, make_network, with_routing
from tests.helpers.tiny import KINDS, tiny_config, tiny_tokens
from tests.hf.tiny_models import random_tokens, tiny_model

LOSSES = {
    "aux_loss_lambda": 0.4,
    "entropy_bonus": 0.3,
    "jitter": 0.2,
    "bce_loss_weight": 0.3,
    "z_loss_weight": 0.2,
}


@pytest.mark.parametrize("factor", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_a_training_step_is_finite(kind, factor):
    """Gates of exactly 0 and 1, probabilities that underflow, scores that all tie."""
    config = tiny_config(kind)
    network = make_network(with_routing(config, **known(config, **LOSSES)), dtype=torch.float32)
    for param in network.parameters():
        if "router." in param.global_name:
            param.data.mul_(factor)
    tokens = tiny_tokens(1)[0][:2]
    loss = network(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    for layer in routed_layers(network):
        assert all(value.isfinite() for value in layer.monitor.read().values())


@pytest.mark.parametrize("mode", ["topk", "causal"])
@pytest.mark.parametrize("factor", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("kind", ["dtf4", "mod", "dtrnet-token", "dtrnet-expert"])
def test_a_step_of_the_exported_model_is_finite(kind, factor, mode):
    model, tokens = tiny_model(kind, mode), random_tokens(2, 12)
    for name, param in model.named_parameters():
        if ".router." in name:
            param.data.mul_(factor)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
