"""Invariant 4: every tensor rank takes the same decision for every token, and whole parameters stay bitwise equal."""

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.benchmark.half_on_cpu import widen_products
from megadyn.engine.optimizer import GradientClipper, make_optimizer
from megadyn.kinds.dtrnet.layers import DtrLayer
from megadyn.network import routed_layers, thresholds_of
from megadyn.parallel.grid import Axis, Grid, make_grid
from megadyn.routing.choice import CausalRouter
from tests.helpers.networks import end_step, known, loads_of, make_network, with_routing
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import KINDS, tiny_config, tiny_tokens

NORMS = {"mod-predictor": "hybridnorm", "mod-bce": "lns", "dtrnet-expert": "hybridnorm"}
"""Where it is not `pre`."""


def test_ranks_agree_on_every_token_and_every_whole_parameter():
    run_on_ranks(check_agreement, 4)


def check_agreement() -> None:
    widen_products()
    tp = make_grid(4, 1).tp
    train(tp, "dtf", torch.float32, recompute="full")
    for kind in KINDS:
        if kind != "dense":
            train(tp, kind, torch.bfloat16, recompute="none")
    train(tp, "dtrnet-token", torch.float32, recompute="full")


def assert_same_bits(what: str, x: Tensor, tp: Axis) -> None:
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(tp.size)]
    dist.all_gather(parts, x, group=tp.group)
    assert all(torch.equal(part, x) for part in parts), f"{what} differs between tensor ranks"


def train(tp: Axis, kind: str, dtype: torch.dtype, recompute: str) -> None:
    """Two steps with fewer key/value heads (2) than ranks (4), so that whole weights take summed gradients."""
    config = tiny_config(kind, tensor=4, recompute=recompute, normalization=NORMS.get(kind, "pre"))
    config = with_routing(config, **known(config, capacity=0.4, jitter=0.2, safe_min_attn_ratio=0.4))
    config.optimizer.learning_rate = 0.03  # far above what bf16 rounds away
    network = make_network(config, tp, dtype)
    optimizer = make_optimizer(network, config.optimizer)
    optimizer.register_step_pre_hook(GradientClipper(network, 0.1, Grid(tp=tp)))
    layers, scores, chosen = routed_layers(network), [], []

    def watch(choose):
        def watched(score, hidden):
            scores.append(score)
            found = choose(score, hidden)
            chosen.append(found[0].places)
            return found

        return watched

    for module in network.modules():
        if isinstance(module, DtrLayer):
            module.choice = watch(module.choice)
        elif isinstance(module, CausalRouter):
            module.forward = watch(module.forward)
    start = {p.global_name: p.detach().clone() for p in network.parameters()}
    for step, samples in enumerate(tiny_tokens(2)):
        optimizer.zero_grad()
        network(samples[:, :-1], samples[:, 1:]).backward()
        optimizer.step()
        end_step(network)
        for index, threshold in thresholds_of(layers).items():
            assert_same_bits(f"{kind}: threshold of layer {index}, step {step}", threshold.value.view(1), tp)
        for index, load in loads_of(layers).items():
            assert_same_bits(f"{kind}: share of layer {index}, step {step}", load.share.view(1), tp)
    watched_twice = 2 if kind == "dtrnet-expert" else 1  # by the layer and by its causal router
    choosing = [layer for layer in layers if isinstance(layer, DtrLayer) or layer.causal_router is not None]
    assert len(scores) == 2 * watched_twice * len(choosing)
    for score, positions in zip(scores, chosen, strict=True):
        assert score.dtype == torch.float32
        assert_same_bits(f"{kind}: a score", score, tp)
        assert_same_bits(f"{kind}: the number chosen", torch.tensor(positions.shape), tp)
        assert_same_bits(f"{kind}: a choice", positions, tp)
    whole = [p for p in network.parameters() if not p.tensor_model_parallel]
    names = {p.global_name.split(".")[-2] for p in whole}
    assert {
        "k_proj",
        "v_proj",
        *(("q_norm", "k_norm", "v_norm") if NORMS.get(kind) == "hybridnorm" else ()),
    } <= names
    for param in whole:
        assert not torch.equal(param, start[param.global_name]), f"{param.global_name} of {kind} did not move"
        assert_same_bits(f"{kind}: {param.global_name}", param, tp)
