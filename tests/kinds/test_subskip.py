"""SkipGPT against its formulas: two halves as loops over tokens, noise that depends on no layout, the loss on the share."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megadyn.kinds.subskip.layers import KeptShare, SubskipLayer
from megadyn.model.block import Stream
from megadyn.network import layer_list
from megadyn.planning.flops import layer_flops
from megadyn.routing.layer import LossScale
from tests.helpers.naive import NaiveLayer
from tests.helpers.networks import disturb, layer_context, make_layer, param_maker, with_routing
from tests.helpers.tiny import tiny_config

T = 9


def layer_and_loop(norm: str = "pre", **keys: object) -> tuple[SubskipLayer, NaiveLayer]:
    config = with_routing(tiny_config("subskip", normalization=norm, hidden_size=16, ffn_size=24), **keys)
    layer = disturb(make_layer(config, 3), param_maker(config))
    return layer, NaiveLayer(layer, config.model)


def hidden(samples: int = 2) -> Tensor:
    return torch.randn(samples, T, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def leads(layer: SubskipLayer, h: Tensor) -> Tensor:
    """r_keep - r_skip of both halves, [B, T, 2], from the parameters."""
    params = {name: p for name, p in layer.named_parameters() if name.startswith("router")}
    found = []
    for half in ("attn", "mlp"):
        w1, b1, w2, b2 = (
            params[f"router.{half}.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        )
        logits = (h @ w1.T + b1).clamp(min=0) @ w2.T + b2
        found.append(logits[..., 0] - logits[..., 1])
    return torch.stack(found, dim=-1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["pre", "lns", "hybridnorm"])
def test_a_layer_is_its_formula_with_all_gradients(norm, training):
    layer, naive = layer_and_loop(norm, keep_loss_weight=0.0)
    h = hidden().requires_grad_()
    layer.set_share(Stream(h), 0.5)
    lead = leads(layer, h)
    soft = ((lead + layer.noise(lead)) / layer.kept.temperature).sigmoid() if training else lead.sigmoid()
    gate = 1 + soft - soft.detach()
    want = []
    for row, g, s in zip(h, gate, soft, strict=True):
        attending, feeding = ([t for t in range(T) if s[t, half] > 0.5] for half in (0, 1))
        assert 0 < len(attending) < T and 0 < len(feeding) < T, (
            "the routers must choose, or the test shows nothing"
        )
        want.append(naive.halves(row, attending, feeding, g))
    with torch.set_grad_enabled(training):
        found = layer(Stream(h)).hidden
    assert_close(found, torch.stack(want))
    if not training:
        return
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    params = [h, *layer.parameters()]
    mine, reference = (torch.autograd.grad(out, params, grad) for out in (found, torch.stack(want)))
    for x, y in zip(mine, reference, strict=True):
        assert_close(x, y, rtol=1e-6, atol=1e-9)
    assert all(
        x.any()
        for name, x in zip(("h", *dict(layer.named_parameters())), mine, strict=True)
        if "k_proj.bias" not in name
    )


def test_noise_is_that_of_the_sample_and_the_step():
    """Not of the micro-batch, nor of the rank that sees the sample."""
    layer, _ = layer_and_loop()
    shape = torch.zeros(4, T, 2, dtype=torch.float64)
    whole = layer.noise(shape)
    parts = []
    for _ in range(2):
        parts.append(layer.noise(shape[:2]))
        layer.kept.observe(torch.tensor(0.5))
    assert torch.equal(torch.cat(parts), whole)
    layer.kept.take_step_mean()
    layer.first_sample = 2  # another data-parallel rank's
    assert torch.equal(layer.noise(shape[:2]), whole[2:])
    layer.first_sample = 0
    layer.kept.end_step(torch.tensor(0.5), torch.tensor(1.0))
    assert not torch.isclose(layer.noise(shape), whole).any()
    assert len({layer.noise(shape)[0, 0, half].item() for half in (0, 1)}) == 2


def test_noise_is_a_difference_of_gumbel_variables():
    """Logistic: keep is drawn as often as its probability says."""
    layer, _ = layer_and_loop()
    noise = layer.noise(torch.zeros(400, T, 2, dtype=torch.float64))
    for lead in (-1.0, 0.0, 2.0):
        assert float((lead + noise > 0).double().mean()) == pytest.approx(1 / (1 + torch.e**-lead), abs=0.02)


def test_the_temperature_falls_and_survives_a_checkpoint():
    kept = KeptShare(layers=2, target=0.5, temperature_end=0.2, temperature_steps=4)
    seen = []
    for _ in range(6):
        seen.append(kept.temperature)
        kept.end_step(torch.tensor(0.6), torch.tensor(1.3))
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    again = KeptShare(layers=2, target=0.5, temperature_end=0.2, temperature_steps=4)
    again.set_state(kept.state(), torch.device("cpu"))
    assert (again.state(), again.temperature) == (kept.state(), kept.temperature)
    assert float(kept.share) == pytest.approx(0.65)


def test_the_loss_pushes_as_the_squared_difference_would():
    """Its gradient by the model's share is 2 weight (share of the step before - capacity)."""
    config = with_routing(tiny_config("subskip"), keep_loss_weight=3.0, capacity=0.5)
    part = layer_list(replace(layer_context(config)), LossScale(0.25))[4]
    layer = part.build(*part.arguments)
    layer.kept.share = torch.tensor(0.8)
    h = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lead = leads(layer, h)
    soft = ((lead + layer.noise(lead)) / layer.kept.temperature).sigmoid()
    names = ["router.attn.fc1.weight", "router.mlp.fc2.bias"]
    params = [dict(layer.named_parameters())[name] for name in names]
    want = torch.autograd.grad(0.25 * 3.0 * 2 * (0.8 - 0.5) * soft.mean() / 2, params)  # two routed layers
    found = torch.autograd.grad(layer(Stream(h)).hidden, params, torch.zeros(2, T, 32, dtype=torch.float64))
    for x, y in zip(found, want, strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-12)


def test_the_share_of_work_is_where_the_plan_has_as_many_operations():
    config = tiny_config("subskip")
    part = layer_list(layer_context(config), LossScale())[4]
    layer, length = part.build(*part.arguments), 40
    attention, mlp = torch.zeros(1, length), torch.zeros(1, length)
    attention[0, :10], mlp[0, :28] = 1, 1
    share = float(layer.work(attention, mlp))
    d, f, width = 32, config.model.ffn_size, 32 + 2 * 16 + 32
    by_hand = 2 * 10 * d * width + 2 * 10 * 10 * 32 + 2 * 28 * 3 * d * f
    assert layer_flops(config.model, length, {3: share})[3].cut == pytest.approx(by_hand, rel=1e-6)
