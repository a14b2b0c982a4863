"""Compiled layers equal plain ones, by one graph a kind of layer; what cannot be compiled is refused."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.testing import assert_close

from megadyn.config import engine_settings
from megadyn.errors import ConfigError
from megadyn.model import compiled
from megadyn.network import Network
from megadyn.routing.layer import LossScale
from tests.helpers.networks import disturb, gradients, layer_context, param_maker
from tests.helpers.tiny import tiny_config, tiny_tokens


def trained(config, compile_run: bool):
    """Loss and gradients of a second step, and what a step without gradients then makes of it."""
    config.training.compile = compile_run
    context = layer_context(config.checked(), dtype=torch.float64)
    network = disturb(Network(context, LossScale()), param_maker(config))
    ((tokens, labels),) = ((x[:, :-1], x[:, 1:]) for x in tiny_tokens(1)[0].split(4))
    for _ in range(2):
        network.zero_grad()
        loss = network(tokens, labels)
        loss.backward()
    with torch.no_grad():
        evaluated = network(tokens, labels)
    return loss.detach(), evaluated, gradients(network)


@pytest.mark.parametrize(
    ("kind", "recompute", "window", "graphs"),
    [("dtf", "none", None, 2), ("mod-predictor", "full", 5, 2), ("dense", "selective", None, 2)],
)
def test_compiled_layers_equal_plain_ones_and_share_their_graphs(
    monkeypatch, kind, recompute, window, graphs
):
    """Captured and differentiated as for real, but run by torch's own kernels: building C++ takes a minute. The dense model's
    norms are scaled layer by layer, which takes a second graph, but no third."""
    built = []

    def backend(graph, inputs):
        built.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", backend)
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    norm = "lns" if kind == "dense" else "pre"
    config = tiny_config(kind, recompute=recompute, normalization=norm, num_layers=4, sliding_window=window)
    assert_close(trained(config, True), trained(config, False))
    compiled._compiled.cache_clear()
    assert len(built) == graphs


class Doubler:
    def double(self, x):
        return x * 2


def test_a_model_of_another_shape_is_compiled_for_its_own(monkeypatch):
    """Without forgetting, the second graph is one for any number of tokens."""
    inputs_of = []

    def backend(graph, inputs):
        inputs_of.append(inputs)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    compiled.forget_compiled()
    for length in (8, 6, 4):
        compiled.compiled(Doubler().double, torch.ones(length))
        compiled.forget_compiled()
    assert [[tuple(x.shape) for x in inputs] for inputs in inputs_of] == [[(8,)], [(6,)], [(4,)]]


@pytest.mark.parametrize(
    ("kind", "change", "key"),
    [
        ("dense", "parallel", "parallel.tensor = .* with training.compile"),
        ("dense", "data", "data.document_mask = .* with training.compile"),
        ("dtrnet-token", None, "with dtrnet, each token's own choice"),
    ],
)
def test_what_has_no_fixed_shapes_is_refused(kind, change, key):
    config = tiny_config(kind)
    config.training.compile = True
    if change == "parallel":
        config.parallel.tensor = 2
    if change == "data":
        config.data.document_mask = True
    with pytest.raises(ConfigError, match=key):
        config.checked()


def test_zero_3_is_refused():
    config = tiny_config("dense", zero=3)
    config.training.compile = True
    with pytest.raises(ConfigError, match="at most 2 with training.compile"):
        engine_settings(config)


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    compiled.check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"training.compile = True: must be false on this machine: .*no-such-compiler"
    ):
        compiled.check_compiler()
