"""Compiled layers equal plain ones, by one graph a kind of layer, and a run needs no more of them after its second step."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.testing import assert_close

from megadyn.config import batch_plan, engine_settings
from megadyn.errors import ConfigError
from megadyn.model import compiled
from megadyn.network import Network
from megadyn.routing.layer import LossScale
from tests.helpers.networks import disturb, gradients, layer_context, param_maker
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import micro_batches, tiny_config, tiny_tokens

EOD = 6


@pytest.fixture
def built(monkeypatch):
    """The graphs that were compiled."""
    found = []
    monkeypatch.setattr(compiled, "BACKEND", noting(found))
    yield found
    compiled._compiled.cache_clear()


def noting(graphs):
    """Captures and differentiates as for real, but torch's own kernels run the graph: building C++ takes a minute."""
    compiled._compiled.cache_clear()
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return backend


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
def test_compiled_layers_equal_plain_ones_and_share_their_graphs(built, kind, recompute, window, graphs):
    """The dense model's norms are scaled layer by layer, which takes a second graph, but no third."""
    norm = "lns" if kind == "dense" else "pre"
    config = tiny_config(kind, recompute=recompute, normalization=norm, num_layers=4, sliding_window=window)
    assert_close(trained(config, True), trained(config, False))
    assert len(built) == graphs


def documents(step: int) -> torch.Tensor:
    """[4, 25], in other documents at each step."""
    tokens = tiny_tokens(step + 1)[step].clone()
    ends = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)) < 0.1 * (step + 1)
    return tokens.masked_fill(ends, EOD)


def test_documents_and_tokens_of_varying_number_take_no_new_graphs(built):
    """Every token chooses for itself, within its document. A dense and a routed layer have a window, another of each has none."""

    def run(compile_run: bool):
        config.training.compile = compile_run
        context = replace(layer_context(config.checked(), dtype=torch.float64), eod=EOD)
        network, found = disturb(Network(context, LossScale()), param_maker(config)), []
        for step in range(4):
            network.zero_grad()
            tokens = documents(step)
            loss = network(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            found.append((loss.detach(), {name: grad.clone() for name, grad in gradients(network).items()}))
            graphs.append(len(built))
        return found

    graphs: list[int] = []
    config = tiny_config("dtrnet-token", num_layers=4, sliding_window=5, window_layers=[0, 1])
    assert_close(run(True), run(False))
    assert graphs[1] == graphs[3], "a graph was compiled after the second step"


def test_tensor_ranks_communicate_within_a_graph():
    run_on_ranks(check_ranks, 2)


def check_ranks() -> None:
    """Under sequence parallelism and the engine. A measured step, which replaces torch's collectives, needs no other graph."""
    from megadyn.engine.engine import Engine
    from megadyn.launch import launch
    from megadyn.parallel.grid import make_grid

    launch.join()

    def run(compile_run: bool):
        config = tiny_config("mod", tensor=2, micro_batch=4, num_layers=2)
        config.parallel.sequence, config.training.compile = True, compile_run
        engine = Engine(config.checked(), batch_plan(config, 2), make_grid(2, 1))
        found = []
        for step in range(3):
            result = engine.train_step(micro_batches(tiny_tokens(3)[step], 4), 1e-3, measure=step == 2)
            found.append((float(result.loss), float(result.grad_norm)))
            graphs.append(len(built))
        engine.engine.destroy()
        return found

    built, graphs = [], []
    compiled.BACKEND = noting(built)
    with_graphs, without = run(True), run(False)
    assert_close(torch.tensor(with_graphs), torch.tensor(without), rtol=1e-5, atol=0)
    assert graphs == [2] * 6, "one graph for dense layers and one for routed ones"


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
