"""Skipping the middle against its formulas: gates that add up, mirrored; what is refused; the pressure on the share."""

import pytest
import torch
from torch.testing import assert_close

from megadyn.errors import ConfigError
from megadyn.kinds.skip_middle.layers import Pressure
from megadyn.model.block import Stream
from megadyn.network import Network, routed_layers
from tests.helpers.naive import NaiveLayer
from tests.helpers.networks import make_network
from tests.helpers.tiny import tiny_config, tiny_tokens

T = 9


def leaving(network: Network, bias: float) -> None:
    """Sharper gates, so that at a bias near 0 some tokens leave at each layer of the first half, some at none."""
    with torch.no_grad():
        for layer in network.layers[1:3]:
            layer.router.weight.mul_(3)
            layer.router.bias.fill_(bias)


@pytest.mark.parametrize("norm", ["pre", "lns", "hybridnorm"])
def test_the_stack_is_its_formula_with_all_gradients(norm):
    config = tiny_config("skip_middle", normalization=norm, hidden_size=16, ffn_size=24)
    network = make_network(config)
    leaving(network, 0.0)
    layers = network.layers[1:5]
    h = torch.randn(
        2, T, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    rows, counts = [], []
    for row in h:
        sums = [torch.zeros(T, dtype=torch.float64)]
        for index, layer in enumerate(layers):
            naive = NaiveLayer(layer, config.model)
            if index < 2:
                sums.append(
                    sums[-1]
                    + (row @ naive.params["router.weight"][0] + naive.params["router.bias"]).clamp(min=0)
                )
            m = sums[index + 1] if index < 2 else sums[4 - index]
            going = [t for t in range(T) if m[t] < 1]
            counts.append(len(going))
            row = naive.skipping(row, going, 1 - m.clamp(0, 1))
        rows.append(row)
    for first, second, mirror, last in (counts[:4], counts[4:]):
        assert (mirror, last) == (second, first)
        assert 0 < second < first < T, "tokens must leave at both layers, or the test shows nothing"
    stream = Stream(h)
    for layer in layers:
        stream = layer(stream)
    assert_close(stream.hidden, torch.stack(rows))
    grad = torch.randn(h.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    params = [h, *layers.parameters()]
    mine, reference = (torch.autograd.grad(out, params, grad) for out in (stream.hidden, torch.stack(rows)))
    for x, y in zip(mine, reference, strict=True):
        assert_close(x, y, rtol=1e-6, atol=1e-9)


def test_without_leaving_it_is_the_dense_stack():
    network, dense = make_network(tiny_config("skip_middle")), make_network(tiny_config("dense"))
    leaving(network, -1e6)
    tokens = tiny_tokens(1)[0][:, :-1]
    with torch.no_grad():
        assert_close(network(tokens), dense(tokens))


def test_a_token_that_left_is_away_up_to_the_mirror():
    network = make_network(tiny_config("skip_middle"))
    leaving(network, 0.0)
    network(tiny_tokens(1)[0][:, :-1])
    shares = [float(layer.monitor.read()["routed_fraction"]) for layer in routed_layers(network)]
    assert shares == shares[::-1]
    assert shares[1] < shares[0] < 1


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="parallel.pipeline.*only one tensor is sent"):
        tiny_config("skip_middle", pipeline=2)
    with pytest.raises(ConfigError, match="model.num_layers.*mirror"):
        tiny_config("skip_middle", num_layers=5)


def test_the_pressure_follows_the_share_of_all_layers_and_survives_a_checkpoint():
    pressure = Pressure(layers=2, target=0.5, rate=0.1)
    pressure.end_step(torch.tensor(0.9), torch.tensor(1.6))
    pressure.end_step(torch.tensor(0.0), torch.tensor(0.8))
    assert float(pressure.weight) == pytest.approx(0.1 * 0.3 - 0.1 * 0.1)
    again = Pressure(layers=2, target=0.5, rate=0.1)
    again.set_state(pressure.state(), torch.device("cpu"))
    assert again.state() == pressure.state()


def test_pressure_opens_and_closes_gates():
    """Its gradient is that of weight times the mean gate, a mean over the layers of the first half."""
    network = make_network(tiny_config("skip_middle"))
    leaving(network, 0.0)
    layer = network.layers[1]
    layer.pressure.weight = torch.tensor(2.0)
    h = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gate = 1 - (h @ layer.router.weight[0]).clamp(min=0).clamp(max=1)
    (want,) = torch.autograd.grad(2.0 * gate.mean() / 2, layer.router.weight)
    (found,) = torch.autograd.grad(
        layer(Stream(h)).hidden, layer.router.weight, torch.zeros(2, T, 32, dtype=torch.float64)
    )
    assert want.any()
    assert_close(found, want)
