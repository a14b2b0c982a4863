"""Invariant 4: every tensor rank takes the same decision for every token, and whole parameters stay bitwise equal."""

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.network import routed_layers
from megadyn.parallel.grid import Axis, Grid, make_grid
from megadyn.routing.dtf import DynamicLayer
from megadyn.training.optimizer import GradientClipper, make_optimizer
from tests.networks import make_network, with_routing
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config, tiny_tokens


def test_ranks_agree_on_every_token_and_every_whole_parameter():
    run_on_ranks(check_agreement, 4)


def check_agreement() -> None:
    tp = make_grid(4, 1).tp
    train(tp, torch.float32, recompute=True)
    train(tp, torch.bfloat16, recompute=False)


def assert_same_bits(what: str, x: Tensor, tp: Axis) -> None:
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    dist.all_gather(parts, x, group=tp.group)
    assert all(torch.equal(part, x) for part in parts), f"{what} differs between tensor ranks"


def train(tp: Axis, dtype: torch.dtype, recompute: bool) -> None:
    """Three steps with fewer key/value heads (2) than ranks (4), so that whole weights take summed gradients."""
    config = with_routing(tiny_config(tensor=4, recompute=recompute), capacity=0.4)
    config.optimizer.learning_rate = 0.03          # far above what bf16 rounds away
    network = make_network(config, tp, dtype)
    optimizer = make_optimizer(network, config.optimizer)
    optimizer.register_step_pre_hook(GradientClipper(network, 0.1, Grid(tp=tp)))
    gates: list[Tensor] = []
    choices: list[Tensor] = []
    for layer in network.layers:
        if isinstance(layer, DynamicLayer):
            choose = layer.choose
            layer.choose = lambda gate, choose=choose: gates.append(gate) or choices.append(choose(gate)) or choices[-1]
    start = {p.global_name: p.detach().clone() for p in network.parameters()}
    for step, samples in enumerate(tiny_tokens(3)):
        optimizer.zero_grad()
        network(samples[:, :-1], samples[:, 1:]).backward()
        optimizer.step()
        for layer in routed_layers(network):
            if isinstance(layer, DynamicLayer):
                layer.threshold.end_step(layer.threshold.take_step_mean())
                assert_same_bits(f"threshold of layer {layer.index}, step {step}", layer.threshold.value.view(1), tp)
    assert len(choices) == 6
    for gate, choice in zip(gates, choices, strict=True):
        assert_same_bits("a gate", gate, tp)
        assert_same_bits("a choice", choice.positions, tp)
    whole = [p for p in network.parameters() if not p.tensor_model_parallel]
    assert {name for p in whole if (name := p.global_name.split(".")[-2]) in ("k_proj", "v_proj")} == {"k_proj", "v_proj"}
    for param in whole:
        assert not torch.equal(param, start[param.global_name]), f"{param.global_name} did not move"
        assert_same_bits(param.global_name, param, tp)
