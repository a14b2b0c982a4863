"""Auxiliary losses: attached where they arise, scaled as the engine scales the loss, and reaching what they should."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megadyn.config import Config
from megadyn.kinds.dtf.layers import DecisionLayer
from megadyn.kinds.dtrnet import layers as dtrnet
from megadyn.model.block import Layer, Stream
from megadyn.network import routed_layers
from megadyn.routing import layer as routed_layer
from megadyn.routing.layer import attach_loss
from tests.helpers.naive import prior_update
from tests.helpers.networks import gradients, known, loads_of, make_network, with_routing
from tests.helpers.tiny import KINDS, tiny_config, tiny_tokens


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


# ---- DTF: the prior alone ------------------------------------------------------------------------


def grads(weight: float, loss_scale: float = 1.0, recompute: str = "none") -> dict[str, torch.Tensor]:
    network = make_network(
        with_routing(tiny_config(recompute=recompute), prior_loss_weight=weight), loss_scale=loss_scale
    )
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:]).backward()
    return gradients(network)


@pytest.mark.parametrize("recompute", ["none", "full"])
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
                lambda layer, inputs, output: states.update({layer.index: (inputs[0].hidden, output.hidden)})
            )
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:])
    assert len(states) == 2
    without, found = grads(0.0, loss_scale), grads(0.7, loss_scale)
    for layer in network.layers:
        if isinstance(layer, DecisionLayer):
            h, post = (x.detach() for x in states[layer.index])
            loss = (h + prior_update(layer.prior, h) - post).square().mean()
            assert_close(layer.monitor.read()["prior_loss"].double(), loss.detach(), rtol=1e-6, atol=0)
            params = list(layer.prior.parameters())
            for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                assert_close(
                    found[param.global_name] - without[param.global_name], 0.7 / 2 * loss_scale * grad
                )


# ---- MoD, DTRNet and predictors: against the losses written down anew ----------------------------

WEIGHTS = {
    "prior_loss_weight": 0.0,
    "predictor_loss_weight": 0.6,
    "bce_loss_weight": 0.3,
    "z_loss_weight": 0.2,
    "aux_loss_lambda": 0.4,
    "entropy_bonus": 0.3,
}
SHARES = {"dtrnet-token": {1: 0.3, 3: 0.7}, "dtrnet-expert": {1: 0.3, 2: 0.6, 3: 0.1}}
"""The share of each layer in the attention loss."""


def written_anew(config: Config, layer: Layer, h: Tensor, share: float, given: Tensor | None) -> Tensor:
    """All auxiliary losses of a routed layer with input h, weighted, from the parameters and `routing.md`."""
    routing, p = config.model.routing, dict(layer.named_parameters())
    if routing.kind == "dtrnet":
        inner = h @ p["router.fc1.weight"].T + p["router.fc1.bias"]
        logits = (inner * inner.sigmoid()) @ p["router.fc2.weight"].T + p["router.fc2.bias"]
        odds = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
        entropy = -(odds * odds.log()).sum(dim=-1).mean()
        layers = config.model.layer_types.count("dtrnet")
        return (
            0.4 * (1 / 3 if routing.aux_loss_warmup else 1) * share * odds[..., 0].mean()
            - 0.3 / layers * entropy
        )
    score = given if routing.kind == "dtf" else h @ p["router.weight"][0]
    count = int(routing.capacity * h.shape[1])
    y = torch.zeros_like(score).scatter(1, score.topk(count, dim=1).indices, 1.0)

    def cross_entropy(logit: Tensor) -> Tensor:
        return -(y * torch.log(logit.sigmoid()) + (1 - y) * torch.log((-logit).sigmoid())).mean()

    loss = torch.zeros((), dtype=torch.float64)
    if routing.kind == "mod":
        loss = 0.3 * cross_entropy(score) + 0.2 * score.square().mean()
    if routing.causal == "predictor":
        inner = h.detach() @ p["causal_router.fc1.weight"].T
        loss = loss + 0.6 * cross_entropy(
            ((inner * inner.sigmoid()) @ p["causal_router.fc2.weight"].T)[..., 0]
        )
    return loss / 2  # the mean over two such layers


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "kind", ["dtf-predictor", "mod", "mod-predictor", "mod-bce", "dtrnet-token", "dtrnet-expert"]
)
def test_gradients_are_those_of_the_whole_sum_of_losses(kind, recompute):
    """Of every parameter: what a loss should not reach shows as much as what it should."""
    config = tiny_config(kind, recompute=recompute)
    config = with_routing(config, **known(config, **WEIGHTS))
    attached = make_network(config, loss_scale=0.7)
    explicit = make_network(with_routing(tiny_config(kind), **known(config, **dict.fromkeys(WEIGHTS, 0.0))))
    shares, losses = SHARES.get(kind, {}), []
    for network in (attached, explicit):
        for index, load in loads_of(routed_layers(network)).items():
            load.share = torch.tensor(shares[index])

    def add(layer: Layer, inputs: tuple[Stream], output: Stream) -> None:
        losses.append(
            written_anew(config, layer, inputs[0].hidden, shares.get(layer.index, 0.0), inputs[0].score)
        )

    for layer in routed_layers(explicit):
        if not isinstance(layer, DecisionLayer):
            layer.register_forward_hook(add)
    tokens = tiny_tokens(1)[0]
    (0.7 * attached(tokens[:, :-1], tokens[:, 1:])).backward()
    loss = explicit(tokens[:, :-1], tokens[:, 1:])
    params = list(explicit.parameters())
    without = torch.autograd.grad(0.7 * loss, params, retain_graph=True, materialize_grads=True)
    want = torch.autograd.grad(0.7 * (loss + sum(losses)), params, materialize_grads=True)
    found, reached = gradients(attached), set()
    for param, grad, plain in zip(params, want, without, strict=True):
        assert_close(
            found[param.global_name], grad, msg=lambda text, param=param: f"{param.global_name}: {text}"
        )
        if not torch.equal(grad, plain):
            reached.add(param.global_name)
    if kind == "dtf-predictor":
        assert reached == {name for name in found if ".causal_router." in name}
    else:
        assert {name for name in found if ".router." in name or ".causal_router." in name} <= reached
        assert {name for name in found if "embed_tokens" in name} <= reached, (
            "it goes back through the hidden states"
        )
        assert not {"lm_head.weight", "model.norm.weight"} & reached
        assert not {name for name in found if name.startswith("model.layers.3.mlp")} & reached


@pytest.mark.parametrize("kind", ["dtf-predictor", "mod-predictor"])
def test_the_predictors_loss_changes_no_bit_of_anything_elses_gradient(kind):
    def grads(weight: float) -> dict[str, Tensor]:
        network = make_network(with_routing(tiny_config(kind), predictor_loss_weight=weight))
        tokens = tiny_tokens(1)[0]
        network(tokens[:, :-1], tokens[:, 1:]).backward()
        return gradients(network)

    without, large = grads(0.0), grads(1e4)
    for name in without:
        if ".causal_router." in name:
            assert not without[name].any()
            assert large[name].any(), name
        else:
            assert torch.equal(large[name], without[name]), name


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("dense", "nested") and not kind.startswith("fixed")]
)
def test_no_auxiliary_loss_is_sent_in_evaluation(kind, monkeypatch):
    sent = []
    for owner in (dtrnet, routed_layer):
        monkeypatch.setattr(
            owner, "attach_loss", lambda out, loss, scale: sent.append(loss) or attach_loss(out, loss, scale)
        )
    network = make_network(tiny_config(kind))
    tokens = tiny_tokens(1)[0]
    network(tokens[:, :-1], tokens[:, 1:])
    assert sent
    sent.clear()
    with torch.no_grad():
        loss = network(tokens[:, :-1], tokens[:, 1:])
    assert not sent
    assert not loss.requires_grad
