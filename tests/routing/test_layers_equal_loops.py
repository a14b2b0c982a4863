"""Every layer against a loop over tokens written from `routing.md`: outputs and all gradients, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from megadyn.model.block import Layer, Stream
from megadyn.routing.tracker import RunningThreshold
from tests.helpers.naive import NaiveLayer, best
from tests.helpers.networks import disturb, known, param_maker, with_routing
from tests.helpers.networks import make_layer as layer_of
from tests.helpers.tiny import KINDS, tiny_config

NORMS = ["pre", "lns", "hybridnorm"]
T = 9
NO_LOSSES = {
    "prior_loss_weight": 0.0,
    "predictor_loss_weight": 0.0,
    "bce_loss_weight": 0.0,
    "z_loss_weight": 0.0,
    "aux_loss_lambda": 0.0,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(kind: str, norm: str, **routing: object) -> tuple[Layer, NaiveLayer]:
    """The last routed layer of four (so that `lns` scales it), small, and its loop. `dense` is the third."""
    config = tiny_config(kind, normalization=norm, hidden_size=16, ffn_size=24, num_kv_heads=2)
    config = with_routing(config, **known(config, **NO_LOSSES), **routing)
    layer = layer_of(config, 2 if kind == "dense" else 3)
    return disturb(layer, param_maker(config)), NaiveLayer(layer, config.model)


def assert_same_with_gradients(
    layer: nn.Module, inputs: list[Tensor], found: Tensor, want: Tensor, untouched: set[str]
) -> None:
    """`untouched`: names of parameters that the outputs do not depend on."""
    assert_close(found, want)
    grad = random(*found.shape, seed=9)
    names, params = zip(
        *((name, p) for name, p in layer.named_parameters() if name.split(".")[0] not in untouched)
    )
    mine = torch.autograd.grad(found, [*inputs, *params], grad)
    reference = torch.autograd.grad(want, [*inputs, *params], grad)
    for name, x, y in zip((*map(str, range(len(inputs))), *names), mine, reference, strict=True):
        if not name.endswith("k_proj.bias"):  # softmax does not see it
            assert y.abs().max() > 1e-6, f"{name} shows nothing"
        assert_close(x, y, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("norm", NORMS)
def test_a_dense_layer(norm):
    layer, naive = make_layer("dense", norm)
    h = random(2, T, 16).requires_grad_()
    want = torch.stack([row + torch.stack(list(naive.block(row, range(T)).values())) for row in h])
    assert_same_with_gradients(layer, [h], layer(Stream(h)).hidden, want, set())


@pytest.mark.parametrize("norm", NORMS)
def test_a_dynamic_layer(norm):
    layer, naive = make_layer("dtf", norm, capacity=0.5)
    h, score = random(2, T, 16).requires_grad_(), random(2, T, seed=1).abs().requires_grad_()
    want = torch.stack([naive.skipping(row, best(r.tolist(), 4), 1 - (-r).exp()) for row, r in zip(h, score)])
    assert_same_with_gradients(layer, [h, score], layer(Stream(h, score)).hidden, want, set())


@pytest.mark.parametrize("mode", ["topk", "causal"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["mod", "mod-predictor", "mod-bce"])
def test_a_mod_layer(kind, norm, mode):
    """`mod-predictor` has the identity gate, the others the sigmoid."""
    layer, naive = make_layer(kind, norm, capacity=0.5)
    router = layer.causal_router
    router.mode = mode
    if router.threshold is not None:
        router.threshold = RunningThreshold(0.0, -0.1, steps=1)
    h = random(2, T, 16).requires_grad_()
    logit = h @ naive.params["router.weight"][0]
    gate = logit if KINDS[kind].get("gate") == "identity" else 1 / (1 + torch.exp(-logit))
    rule = {"mod": logit >= -0.1, "mod-bce": logit > 0, "mod-predictor": predicted(naive, h) >= 0}[kind]
    chosen = (
        [row.nonzero().flatten().tolist() for row in rule]
        if mode == "causal"
        else [best(r.tolist(), 4) for r in logit]
    )
    assert all(0 < len(row) < T for row in chosen), "the rule must choose, or the test shows nothing"
    want = torch.stack([naive.skipping(row, c, g) for row, c, g in zip(h, chosen, gate)])
    assert_same_with_gradients(layer, [h], layer(Stream(h)).hidden, want, {"causal_router"})


def predicted(naive: NaiveLayer, h: Tensor) -> Tensor:
    if "causal_router.fc1.weight" not in naive.params:
        return torch.zeros(h.shape[:2])
    w1, w2 = (naive.params[f"causal_router.{fc}.weight"] for fc in ("fc1", "fc2"))
    return F.silu(h @ w1.T) @ w2[0]


def probabilities(naive: NaiveLayer, h: Tensor) -> Tensor:
    """softmax(W2 SiLU(W1 h + b1) + b2)."""
    w1, b1, w2, b2 = (
        naive.params[f"router.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    )
    logits = F.silu(h @ w1.T + b1) @ w2.T + b2
    return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("mode", ["topk", "causal"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["dtrnet-token", "dtrnet-expert"])
def test_a_dtrnet_layer(kind, norm, mode):
    layer, naive = make_layer(kind, norm, capacity=0.5, safe_min_attn_ratio=0.0)
    h = random(2, T, 16, seed=1).requires_grad_()
    p = probabilities(naive, h)
    attend = p[..., 0]
    if kind == "dtrnet-token":
        chosen = [(row > 0.5).nonzero().flatten().tolist() for row in attend]
    else:
        layer.causal_router.mode = mode
        layer.causal_router.threshold = RunningThreshold(0.0, math.log(0.45 / 0.55), steps=1)
        chosen = [
            best(row.tolist(), 4) if mode == "topk" else (row >= 0.45).nonzero().flatten().tolist()
            for row in attend
        ]
    assert all(0 < len(row) < T for row in chosen), "the rule must choose, or the test shows nothing"
    want = torch.stack([naive.dtrnet(row, c, q) for row, c, q in zip(h, chosen, p)])
    assert_same_with_gradients(layer, [h], layer(Stream(h)).hidden, want, set())


@pytest.mark.parametrize("norm", NORMS)
def test_a_dtrnet_layer_in_which_no_token_of_a_sequence_attends(norm):
    """Nor, in the second pass, in any sequence."""
    layer, naive = make_layer("dtrnet-token", norm, safe_min_attn_ratio=0.0)
    h = random(2, T, 16, seed=1)
    bias = naive.params["router.fc2.bias"]
    with torch.no_grad():
        # one sequence just below 0.5
        bias[1] += torch.logit(probabilities(naive, h)[..., 0].amax(dim=1).min()) + 1e-4
        for more in (0.0, 10.0):
            bias[1] += more
            p = probabilities(naive, h)
            chosen = [(row > 0.5).nonzero().flatten().tolist() for row in p[..., 0]]
            assert [] in chosen
            assert more or any(chosen)
            want = torch.stack([naive.dtrnet(row, c, q) for row, c, q in zip(h, chosen, p)])
            assert_close(layer(Stream(h)).hidden, want)
