"""The promises that megadyn makes for every kind of routing, each a function that raises AssertionError where one is broken.

None of them knows a kind. They run on a tiny model in float64 on one process, unless they say otherwise; what needs ranks is in
`ranked.py`. A kind that chooses by top-k is tried under both routing modes.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megadyn.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megadyn.errors import ConfigError
from megadyn.kinds import DENSE, make_kind
from megadyn.model.block import LayerContext
from megadyn.network import Network, routed_layers, set_routing_mode, thresholds_of
from megadyn.parallel.params import ParamMaker, component, name_of
from megadyn.parallel.sharding import Sharding
from megadyn.planning.flops import training_flops
from megadyn.planning.layouts import workload
from megadyn.planning.memory import fullest
from megadyn.planning.parameters import total_parameters
from megadyn.routing import layer as routed_layer
from megadyn.routing.choice import Choices, Tape
from megadyn.routing.layer import LossScale
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.networks import disturb, end_step
from tests.helpers.tiny import ROOT

VOCAB, LENGTH, EOD = 61, 24, 6


class Case(NamedTuple):
    kind: str
    variant: str
    keys: tuple[tuple[str, Any], ...]
    """Of `model.routing`."""

    def __str__(self) -> str:
        return f"{self.kind.rpartition('.')[2]}-{self.variant}"


def config_of(
    case: Case,
    *,
    length: int = LENGTH,
    tensor: int = 1,
    pipeline: int = 1,
    zero: int = 1,
    sequence: bool = False,
    recompute: str = "none",
    precision: str = "fp32",
    micro_batch: int = 2,
    output_dir: str = "unused",
    **model: Any,
) -> Config:
    """Four layers of width 32, grouped heads, biases, and a vocabulary that no tensor size divides; weights drawn large, so that
    tokens differ."""
    shape = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": VOCAB,
        "qkv_bias": True,
        "init_std": 0.2,
    } | model
    return Config(
        model=ModelConfig(routing=make_kind(case.kind, **dict(case.keys)), **shape),
        data=DataConfig(train="unused"),
        tokenizer=TokenizerConfig(path="byte"),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence),
        optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_iterations=2),
        training=TrainingConfig(
            iterations=10,
            global_batch_size=4,
            micro_batch_size=micro_batch,
            sequence_length=length,
            recompute=recompute,
        ),
        precision=precision,
        deepspeed_config=str(ROOT / f"ds_configs/zero{zero}.json"),
        output_dir=output_dir,
    ).checked()


def tokens_like(samples: int = 4, length: int = LENGTH, seed: int = 7) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(
        EOD + 1, VOCAB, (samples, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def network_of(
    case: Case, *, loss_scale: float = 1.0, eod: int | None = None, **settings: Any
) -> tuple[Network, Config]:
    """With one step behind it, so that thresholds part these tokens."""
    config = config_of(case, **settings)
    make = ParamMaker(Sharding(1, 2), seed=1, dtype=torch.float64)
    ctx = LayerContext(config.model, make, "sdpa", eod, recompute=config.training.recompute)
    network = disturb(Network(ctx, LossScale(loss_scale)), make)
    network(*tokens_like())
    end_step(network)
    return network, config


def modes_of(config: Config) -> tuple[str, ...]:
    return ("topk", "causal") if config.model.routing.has_topk else ("causal",)


@torch.no_grad()
def logits_of(network: Network, tokens: Tensor, mode: str) -> Tensor:
    layers = routed_layers(network)
    set_routing_mode(layers, mode)
    try:
        return network(tokens)
    finally:
        set_routing_mode(layers, "topk")


# ---- what a token may see ------------------------------------------------------------------------


def no_future(case: Case) -> None:
    """Causal mode: the logits at t do not depend on later tokens."""
    network, _ = network_of(case)
    tokens, _ = tokens_like()
    whole = logits_of(network, tokens, "causal")
    for cut in (5, 12, 20):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 17) % (VOCAB - EOD - 1) + EOD + 1
        assert_close(logits_of(network, changed, "causal")[:, :cut], whole[:, :cut], rtol=1e-9, atol=1e-9)


def no_other_sample(case: Case) -> None:
    """A sequence's logits do not depend on the other sequences of its micro-batch, in evaluation and in training."""
    network, config = network_of(case)
    tokens, _ = tokens_like()
    other = tokens.clone()
    other[1:] = tokens_like(seed=8)[0][1:]
    for mode in modes_of(config):
        assert_close(
            logits_of(network, other, mode)[0], logits_of(network, tokens, mode)[0], rtol=1e-9, atol=1e-9
        )
        assert_close(
            logits_of(network, tokens[:1], mode)[0], logits_of(network, tokens, mode)[0], rtol=1e-9, atol=1e-9
        )
    state, trained = tracker_state(network), []
    for given in (tokens, other):  # with gradients: training's own rules (safe minimum, noise, guards)
        restore(network, state)
        trained.append(network(given)[0].detach())
    assert_close(trained[1], trained[0], rtol=1e-9, atol=1e-9)


def no_other_document(case: Case) -> None:
    """With documents masked, causal mode: logits in a document do not depend on the one before it in its sample."""
    network, _ = network_of(case, eod=EOD)
    tokens, _ = tokens_like()
    tokens[:, 9] = EOD
    changed = tokens.clone()
    changed[:, :9] = (changed[:, :9] + 17) % (VOCAB - EOD - 1) + EOD + 1
    whole, found = logits_of(network, tokens, "causal"), logits_of(network, changed, "causal")
    assert_close(found[:, 10:], whole[:, 10:], rtol=1e-9, atol=1e-9)
    assert not torch.equal(found[:, :9], whole[:, :9])


def capacity_one_is_dense(case: Case) -> str | None:
    """With every token taken and gates of 1, the model is the dense one with the same weights."""
    config = config_of(case)
    routing = config.model.routing
    if not routing.equals_dense or not hasattr(routing, "capacity") or routing.varies:
        return "the kind does not say so"
    keys = dict(case.keys) | {"capacity": 1.0}
    network, config = network_of(case._replace(keys=tuple(keys.items())))
    if not all(
        isinstance(layer, routed_layer.SkippingLayer)
        for layer in routed_layers(network)
        if layer.causal_router
    ):
        return "gates of 1 can be set in skipping layers alone"
    dense = Case(DENSE, "default", ())
    twin, _ = network_of(dense)
    mine = {name_of(param): param for param in network.parameters()}
    with torch.no_grad():
        for param in twin.parameters():
            param.copy_(mine[name_of(param)])
    tokens, _ = tokens_like()
    plain = routed_layer.put_back_shared
    with patched(
        routed_layer,
        "put_back_shared",
        lambda x, places, gate, *rest: plain(x, places, torch.ones_like(gate), *rest),
    ):
        found = logits_of(network, tokens, "topk")
    assert_close(found, logits_of(twin, tokens, "topk"), rtol=1e-9, atol=1e-9)
    return None


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Any:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ---- gradients -----------------------------------------------------------------------------------


def gradients_are_those_of_differences(case: Case) -> str | None:
    """Of each parameter that the kind adds, in the last layer of each type, along a random direction, in float64.

    Further back a kind may hold values constant on purpose (averages, targets) that such a parameter moves.
    """
    network, config = network_of(case, loss_scale=0.0)  # auxiliary losses have targets that are held constant
    if config.model.routing.straight_through:
        return "gradients are straight-through on purpose"
    types = config.model.layer_types
    last = {len(types) - 1 - types[::-1].index(name) for name in set(types) - {DENSE}}
    tokens, labels = tokens_like()
    state = [tracker_state(network)]

    def loss() -> Tensor:
        restore(network, state[0])
        return network(tokens, labels)

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for param in network.parameters():
        name = name_of(param)
        is_own = (
            any(name.startswith(f"model.layers.{index}.") for index in last) and component(name) != "base"
        )
        if not is_own or "causal_router" in name:
            continue
        direction = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        start, values = param.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                param.copy_(start + sign * 1e-5 * direction)
                values.append(loss_with_grad_rules(loss))
        with torch.no_grad():
            param.copy_(start)
        want = (values[0] - values[1]) / 2e-5
        found = 0.0 if param.grad is None else float((param.grad * direction).sum())
        assert abs(found - want) <= 1e-4 * abs(want) + 1e-8, f"{name}: {found} where differences say {want}"
    return None


def loss_with_grad_rules(loss: Callable[[], Tensor]) -> float:
    """Under the rules of training, which differ from evaluation's where gradients are on."""
    with torch.enable_grad():
        return loss().item()


def tracker_state(network: Network) -> list[dict[str, Any]]:
    return [dict(vars(tracker)) for layer in routed_layers(network) for tracker in layer.trackers().values()]


def restore(network: Network, states: list[dict[str, Any]]) -> None:
    trackers = [tracker for layer in routed_layers(network) for tracker in layer.trackers().values()]
    for tracker, state in zip(trackers, states, strict=True):
        vars(tracker).update(state)


def recomputation_changes_nothing(case: Case) -> None:
    """`full` and `selective` give the loss, gradients and statistics of `none`, also where a score would come out differently
    the second time: decisions are not taken anew."""

    def trained(recompute: str) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
        network, _ = network_of(case, recompute=recompute)
        for layer in routed_layers(network):
            layer.monitor.read()
        loss = network(*tokens_like())
        if recompute == "full":  # what decides now decides otherwise in the backward pass
            with torch.no_grad():
                for param in network.parameters():
                    if "causal_router" in name_of(param):
                        param.data.add_(5.0)  # unseen by autograd, which would refuse
        for threshold in thresholds_of(routed_layers(network)).values():
            threshold.average = threshold.average + 1e3
        with Choosing() as choosing:
            loss.backward()
        assert not choosing.seen, (
            f"tokens are chosen anew in the backward pass ({', '.join(sorted(choosing.seen))})"
        )
        grads = {name_of(param): param.grad for param in network.parameters() if param.grad is not None}
        return loss.detach(), grads, [layer.monitor.read() for layer in routed_layers(network)]

    loss, grads, statistics = trained("none")
    for recompute in ("selective", "full"):
        again = trained(recompute)
        assert_close(again[0], loss)
        assert again[1].keys() == grads.keys()
        for name, grad in grads.items():
            if "causal_router" not in name:
                assert_close(
                    again[1][name], grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
                )
        assert again[2] == statistics


def choices_can_be_replayed(case: Case) -> str | None:
    """Every choice passes `RoutedLayer.decisions` once, recomputed or not; a layer obeys a recorded one, and computes the same
    from its own when that comes back."""
    network, _ = network_of(case, recompute="full")
    layers = {layer.index: layer for layer in routed_layers(network) if layer.chooses}
    if not layers:
        return "no layer chooses tokens"
    states = tracker_state(network)

    def trained(given: dict[int, Tensor]) -> tuple[float, dict[int, Choices]]:
        restore(network, states)
        tapes = {index: Tape(4, given.get(index), keeps=True) for index in layers}
        for index, layer in layers.items():
            layer.decisions.tape = tapes[index]
        loss = network(*tokens_like())
        loss.backward()
        assert all(tape.passed == 4 for tape in tapes.values()), (
            "samples whose choice passed `decisions` more or less than once"
        )
        return loss.item(), {index: tape.whole() for index, tape in tapes.items()}

    loss, own = trained({})
    for chosen, score, cut in own.values():
        assert (score.masked_fill(~chosen, torch.inf) >= cut.unsqueeze(1)).all()
        assert (score.masked_fill(chosen, -torch.inf) <= cut.unsqueeze(1)).all()
    recorded = {index: choices.chosen for index, choices in own.items()}
    assert trained(recorded)[0] == loss
    for index, chosen in recorded.items():
        assert trained(recorded | {index: with_two_exchanged(chosen)})[0] != loss, (
            f"layer {index} does not obey"
        )
    return None


def with_two_exchanged(chosen: Tensor) -> Tensor:
    """`chosen` [B, T] or [B, T, n] with the choices of two tokens of a sample exchanged, or else one token left out or taken."""
    changed = chosen.clone()
    for row in changed:
        differ = (row != row[:1]).flatten(1).any(dim=1) if row.ndim > 1 else row != row[0]
        if differ.any():
            other = int(differ.nonzero()[-1])
            row[[0, other]] = row[[other, 0]]
            return changed
    changed[0, -1] = ~changed[0, -1]
    return changed


class Choosing(TorchDispatchMode):
    """Sees operations that choose: which values are highest, and where a mask is true."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("sort", "topk", "argsort", "nonzero"):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def every_parameter_learns(case: Case) -> None:
    """Each parameter gets a gradient that is not 0, so that none is there in vain."""
    network, _ = network_of(case)
    network(*tokens_like()).backward()
    idle = [
        name_of(param)
        for param in network.parameters()
        if param.grad is None or not param.grad.abs().sum() > 0
    ]
    idle = [name for name in idle if not name.endswith("k_proj.bias")]  # softmax does not see it
    assert not idle, f"no gradient reaches {idle}"


# ---- costs ---------------------------------------------------------------------------------------


def operations_are_as_planned(case: Case) -> None:
    """Forward operations within 1 % of those that torch counts, at the share of tokens that was taken."""
    network, config = network_of(case, length=96)
    tokens, _ = tokens_like(length=96)
    for layer in routed_layers(network):
        layer.monitor.read()
    set_routing_mode(routed_layers(network), "topk")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(tokens)
    shares = {
        layer.index: float(record["routed_fraction"])
        for layer in routed_layers(network)
        if "routed_fraction" in (record := layer.monitor.read())
    }
    planned = training_flops(config.model, 96, shares, whole_square=True)
    detached = sum(layer.detached for layer in layer_flops_of(config, shares))
    # where sequences differ in what they take, squares add up to a little more
    assert_close(
        counter.get_total_flops() / len(tokens),
        (planned + detached) / 3,
        rtol=0.01 if not config.model.routing.varies else 0.05,
        atol=0,
    )


def layer_flops_of(config: Config, shares: dict[int, float]) -> Any:
    from megadyn.planning.flops import layer_flops

    return layer_flops(config.model, 96, shares)


def parameters_are_as_planned(case: Case) -> None:
    network, config = network_of(case)
    assert sum(param.numel() for param in network.parameters()) == total_parameters(config.model)


def memory_is_as_planned(case: Case, recompute: str = "none") -> None:
    """Weights, gradients and activations of a step on one process, within 10 % of the peak of live bytes."""
    batch, length = 4, 256
    config = config_of(
        case,
        recompute=recompute,
        length=length,
        micro_batch=batch,
        hidden_size=64,
        num_layers=6,
        ffn_size=192,
        vocab_size=500,
    )
    drawn = torch.randint(500, (2, batch, length + 1), generator=torch.Generator().manual_seed(1))
    with LiveBytes() as before:
        pass
    make = ParamMaker(Sharding(1, 2), dtype=torch.float32)
    network = Network(LayerContext(config.model, make, recompute=recompute), LossScale())
    for samples in drawn:
        for layer in routed_layers(network):
            layer.monitor.read()
        with LiveBytes() as step:
            network(samples[:, :-1].contiguous(), samples[:, 1:].contiguous()).backward()
    if config.model.routing.varies:  # planned at the share that was taken
        seen = [
            float(record["routed_fraction"])
            for layer in routed_layers(network)
            if "routed_fraction" in (record := layer.monitor.read())
        ]
        if hasattr(config.model.routing, "capacity"):
            config.model.routing.capacity = min(1.0, max(1e-3, sum(seen) / len(seen)))
    work = replace(workload(config), fused=False)
    planned = 2 * work.bytes * total_parameters(config.model) + fullest(work, [0, 6], 0, 1)
    assert_close(planned / (step.peak - before.now), 1.0, rtol=0.1, atol=0)


# ---- configuration and what people read ----------------------------------------------------------


def foreign_keys_are_refused(case: Case) -> None:
    for key in ("no_such_key", "capasity"):
        with pytest.raises(ConfigError, match=key):
            make_kind(case.kind, **dict(case.keys), **{key: 1})


def statistics_do_not_depend_on_the_split(case: Case) -> None:
    """Means over a step's micro-batches are those of the whole batch."""

    def recorded(size: int) -> list[dict[str, Tensor]]:
        network, _ = network_of(case)
        for layer in routed_layers(network):
            layer.monitor.read()
        tokens, labels = tokens_like()
        for part, wanted in zip(tokens.split(size), labels.split(size), strict=True):
            network(part, wanted)
        return [layer.monitor.read() for layer in routed_layers(network)]

    for whole, split in zip(recorded(4), recorded(1), strict=True):
        assert whole.keys() == split.keys()
        for name, value in whole.items():
            assert_close(
                split[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def it_explains_itself(case: Case) -> None:
    """Title, sentence and figures of the card, the description of a run, and a legend of statistics that exist."""
    network, config = network_of(case)
    routing = config.model.routing
    assert routing.describe() and routing.title and routing.sentence
    recorded: set[str] = set()
    for layer in routed_layers(network):
        recorded |= layer.monitor.read().keys()
    text = routing.explain(dict.fromkeys(recorded, 0.5))
    assert routing.sentence.split(".")[0] in text
    unknown = set(routing.legend) - recorded if case.variant == "default" else set()
    assert not unknown, f"the legend has {unknown}, which no layer records"
    if routing.name != DENSE:
        assert "routed_fraction" in recorded


ALONE: tuple[Callable[[Case], str | None], ...] = (
    no_future,
    no_other_sample,
    no_other_document,
    capacity_one_is_dense,
    gradients_are_those_of_differences,
    recomputation_changes_nothing,
    choices_can_be_replayed,
    every_parameter_learns,
    operations_are_as_planned,
    parameters_are_as_planned,
    foreign_keys_are_refused,
    statistics_do_not_depend_on_the_split,
    it_explains_itself,
)
"""Promises that one process can show."""
