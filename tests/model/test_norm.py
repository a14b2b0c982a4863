"""Normalisations: LNS scales by the layer's own place, hybridnorm norms heads; initial weights follow."""

import pytest
import torch
from torch.testing import assert_close

from megadyn.model.attention import Attention
from megadyn.model.norm import HeadNorm, RMSNorm
from megadyn.network import Network
from megadyn.routing.layer import LossScale
from tests.helpers.naive import prior_update
from tests.helpers.networks import disturb, layer_context, make_network, param_maker
from tests.helpers.tiny import KINDS, tiny_config

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def layers_of(kind: str, **model: object) -> list:
    network = make_network(tiny_config(kind, **model))
    return list(network.layers)[1:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_lns_scales_both_norms_by_the_layers_place_counted_from_one(kind):
    layers, x = layers_of(kind, normalization="lns"), random(2, 3, 32)
    assert len(layers) == 4
    for place, layer in enumerate(layers, start=1):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            root = (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            assert_close(norm(x), x / root * norm.weight / place**0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_lns_scales_neither_the_last_norm_nor_a_priors(kind):
    network = make_network(tiny_config(kind, normalization="lns"))
    priors = [layer.prior for layer in network.layers if hasattr(layer, "prior")]
    assert len(priors) == (2 if kind.startswith(("dtf", "stt")) else 0)
    assert network.layers[-1].scale == 1.0
    for prior in priors:
        h = random(2, 3, 32)
        update = torch.zeros_like(h) if kind == "stt" else h  # what it is told: the update, or the sum
        assert_close(prior(h, update)[1], prior_update(prior, h).square().mean(dim=-1))


def test_the_residual_outputs_start_small_except_under_lns():
    """GPT-2's 1/sqrt(2 layers), which LNS replaces."""
    for norm, want in (("pre", 0.2 / 8**0.5), ("hybridnorm", 0.2 / 8**0.5), ("lns", 0.2)):
        config = tiny_config("dense", normalization=norm, hidden_size=64)
        for layer in list(Network(layer_context(config), LossScale()).layers)[1:-1]:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                assert weight.std().item() == pytest.approx(want, rel=0.05)
            assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.2, rel=0.05)


def test_a_head_norm_norms_each_head_with_one_weight():
    config = tiny_config("dense")
    norm, x = (
        disturb(HeadNorm("a.q_norm", 6, 1e-6, make=param_maker(config)), param_maker(config)),
        random(2, 3, 4, 6),
    )
    want = torch.empty_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        head = x[tuple(place)]
        want[tuple(place)] = head / (head.square().mean() + 1e-6).sqrt() * norm.weight
    assert_close(norm(x), want)
    assert norm.weight.shape == (6,)


@pytest.mark.parametrize("norm", ["pre", "lns", "hybridnorm"])
def test_only_hybridnorm_norms_queries_keys_and_values_and_not_the_input(norm):
    for layer in layers_of("dtrnet-token", normalization=norm):
        names = {name for name, _ in layer.named_parameters() if "norm" in name}
        head_norms = {f"self_attn.{kind}_norm.weight" for kind in "qkv"}
        assert names == {"post_attention_layernorm.weight"} | (
            head_norms if norm == "hybridnorm" else {"input_layernorm.weight"}
        )
        assert isinstance(layer.input_layernorm, RMSNorm) == (norm != "hybridnorm")


def test_head_norms_stand_before_the_rotation():
    """A norm behind it would give another key wherever the weight is not the same for both halves of a pair."""
    config = tiny_config("dense", normalization="hybridnorm")
    make = param_maker(config)
    attention = disturb(
        Attention("model.layers.0.self_attn", config.model, backend="sdpa", make=make, output_std=0.2), make
    )
    x = random(1, 5, 32)
    q, k = attention.rotary(*attention.queries_keys(x), None, 5)
    plain_q, plain_k = (
        (x @ proj.weight.T + proj.bias).unflatten(-1, (-1, 8))
        for proj in (attention.q_proj, attention.k_proj)
    )

    def normed(x, norm):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    want = attention.rotary(normed(plain_q, attention.q_norm), normed(plain_k, attention.k_norm), None, 5)
    turned_first = attention.rotary(plain_q, plain_k, None, 5)
    for mine, right, wrong, norm in zip(
        (q, k), want, turned_first, (attention.q_norm, attention.k_norm), strict=True
    ):
        assert_close(mine, right)
        assert not torch.allclose(mine, normed(wrong, norm))
