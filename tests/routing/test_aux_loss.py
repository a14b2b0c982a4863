"""Auxiliary losses: attached where they arise, scaled as the engine scales the loss, and reaching the prior alone."""

import pytest
import torch
from torch.testing import assert_close

from megadyn.routing.aux_loss import attach_loss
from megadyn.routing.dtf import DecisionLayer
from tests.networks import gradients, make_network, with_routing
from tests.tiny import tiny_config, tiny_tokens


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.1, 1 / 3, 65536 / 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_attached_losss_gradient_is_exactly_its_scale(scale, dtype):
    activation = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = torch.tensor(5.0, dtype=dtype, requires_grad=True)
    out = attach_loss(activation, loss, scale)
    assert torch.equal(out, activation)
    grad = torch.randn(3, 4).bfloat16()
    out.backward(grad)
    assert torch.equal(activation.grad, grad)
    assert loss.grad.dtype == dtype
    assert torch.equal(loss.grad, torch.tensor(scale, dtype=dtype))


def test_an_attached_loss_is_sent_once_however_often_its_activation_is_used():
    activation = torch.randn(3, requires_grad=True)
    loss = torch.tensor(5.0, requires_grad=True)
    out = attach_loss(activation, loss, 0.5)
    (out.sin() + out * out).sum().backward()
    assert loss.grad == 0.5


def grads(weight: float, loss_scale: float = 1.0, recompute: bool = False) -> dict[str, torch.Tensor]:
    network = make_network(with_routing(tiny_config(recompute=recompute), prior_loss_weight=weight), loss_scale=loss_scale)
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:]).backward()
    return gradients(network)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_prior_loss_reaches_the_prior_and_nothing_else(recompute):
    without, large = grads(0.0, recompute=recompute), grads(1e4, recompute=recompute)
    for name in without:
        if ".prior." in name:
            assert (large[name] - without[name]).norm() > without[name].norm(), name
        else:
            assert torch.equal(large[name], without[name]), name


@pytest.mark.parametrize("loss_scale", [1.0, 0.25, 1024.0])
def test_the_prior_loss_is_weighted_averaged_over_layers_and_scaled_as_the_engine_scales(loss_scale):
    """Against the loss written down anew from what goes into each Decision layer and comes out of it."""
    config = with_routing(tiny_config(), prior_loss_weight=0.7)
    network, states = make_network(config), {}
    for layer in network.layers:
        if isinstance(layer, DecisionLayer):
            layer.register_forward_hook(
                lambda layer, inputs, output: states.update({layer.index: (inputs[0].hidden, output.hidden)}))
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:])
    assert len(states) == 2
    without, found = grads(0.0, loss_scale), grads(0.7, loss_scale)
    for layer in network.layers:
        if isinstance(layer, DecisionLayer):
            h, post = (x.detach() for x in states[layer.index])
            loss = (h + layer.prior(h) - post).square().mean()
            assert_close(layer.monitor.read()["prior_loss"].double(), loss.detach(), rtol=1e-6, atol=0)
            params = list(layer.prior.parameters())
            for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                assert_close(found[param.global_name] - without[param.global_name], 0.7 / 2 * loss_scale * grad)


def test_no_prior_loss_is_sent_in_evaluation():
    network = make_network(tiny_config())
    tokens = tiny_tokens(1)[0]
    with torch.no_grad():
        loss = network(tokens[:, :-1], tokens[:, 1:])
    assert not loss.requires_grad
