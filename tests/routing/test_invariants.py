"""What `routing.md` promises of every routed model: invariants 1, 2, 3, 5, 6 and 7. (4 needs ranks: test_ranks_agree.)"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megadyn.config import Config
from megadyn.network import Network, routed_layers, set_routing_mode
from megadyn.routing import dtf
from megadyn.routing.dtf import DecisionLayer, DynamicLayer, SurpriseRouter, moving_average
from tests.networks import gradients, make_network, with_routing
from tests.tiny import tiny_config, tiny_tokens

SAMPLES = tiny_tokens(1)[0]
TOKENS, LABELS = SAMPLES[:, :-1], SAMPLES[:, 1:]


def trained_thresholds(network: Network) -> Network:
    """After one step's observations, so that the causal rule routes some tokens and skips others."""
    network(TOKENS, LABELS)
    for layer in dynamic_layers(network):
        layer.threshold.end_step(layer.threshold.take_step_mean())
        layer.monitor.read()
    return network


def dynamic_layers(network: Network) -> list[DynamicLayer]:
    return [layer for layer in network.layers if isinstance(layer, DynamicLayer)]


# ---- 1: with everything routed at full weight the stack is dense ---------------------------------

@pytest.mark.parametrize("num_layers", [4, 5])
def test_full_capacity_and_a_gate_of_one_equal_the_dense_stack(monkeypatch, num_layers):
    dense = make_network(tiny_config("dense", num_layers=num_layers))
    routed = make_network(with_routing(tiny_config("dtf", num_layers=num_layers), capacity=1.0, prior_loss_weight=0.0))
    with torch.no_grad():
        assert not torch.allclose(routed(TOKENS), dense(TOKENS), atol=1e-3)
    monkeypatch.setattr(SurpriseRouter, "forward", lambda self, static, change: (torch.ones_like(static), {}))
    logits, reference = routed(TOKENS), dense(TOKENS)
    assert_close(logits, reference)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.backward(grad)
    reference.backward(grad)
    found = {p.global_name: p.grad for p in routed.parameters() if p.grad is not None}
    for name, want in gradients(dense).items():
        assert_close(found[name], want)


# ---- 2: sequences of a batch do not see each other -----------------------------------------------

@pytest.mark.parametrize("mode", ["topk", "causal"])
@torch.no_grad()
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(mode):
    with torch.enable_grad():
        network = trained_thresholds(make_network(tiny_config()))
    set_routing_mode(network.layers, mode)
    together = network(TOKENS)
    for row in range(len(TOKENS)):
        assert_close(together[row: row + 1], network(TOKENS[row: row + 1]))
    assert_close(network(TOKENS.flip(0)), together.flip(0))
    changed = TOKENS.clone()
    changed[1:] = changed[1:].flip(1)
    assert_close(network(changed)[0], together[0])


# ---- 3: the causal rule does not look at the future ----------------------------------------------

def reach_of_the_future(network: Network, mode: str) -> float:
    """How much the logits of earlier tokens change when later tokens change, at most."""
    set_routing_mode(network.layers, mode)
    worst = 0.0
    with torch.no_grad():
        before = network(TOKENS)
        for t in (1, 7, 12, 18, 23):
            changed = TOKENS.clone()
            changed[:, t:] = (changed[:, t:] + 17) % 61
            after = network(changed)
            assert not torch.allclose(after[:, t], before[:, t])
            worst = max(worst, (after[:, :t] - before[:, :t]).abs().max().item())
    return worst


def test_the_causal_rule_does_not_look_at_the_future_and_topk_does():
    network = trained_thresholds(make_network(tiny_config()))
    assert reach_of_the_future(network, "causal") < 1e-10
    for layer in dynamic_layers(network):
        assert 0.2 < layer.monitor.read()["routed_fraction"] < 0.8, "the rule must choose, or the test shows nothing"
    assert reach_of_the_future(network, "topk") > 1e-3


def test_a_dense_stack_does_not_look_at_the_future():
    assert reach_of_the_future(make_network(tiny_config("dense")), "topk") < 1e-10


# ---- 5 and 6: recomputation ----------------------------------------------------------------------

class Calls:
    """Counts the calls of functions that are patched through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.count = monkeypatch, {}

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)
        self.count[name] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count[name] += 1
            return function(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_reuses_the_decisions_and_changes_no_bit(monkeypatch, dtype):
    """Two micro-batches of one step, with and without."""
    calls = Calls(monkeypatch)
    for owner, name in ((DecisionLayer, "decide"), (DynamicLayer, "choose"), (DynamicLayer, "update"), (dtf, "choose_top")):
        calls.watch(owner, name)

    def step(recompute: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[Tensor], dict[str, int]]:
        calls.count = dict.fromkeys(calls.count, 0)
        network = make_network(tiny_config(recompute=recompute), dtype=dtype, loss_scale=0.5)
        for part in SAMPLES.split(2):
            (network(part[:, :-1], part[:, 1:]) * 0.5).backward()
        thresholds = []
        for layer in dynamic_layers(network):
            assert layer.threshold._count == 2
            layer.threshold.end_step(layer.threshold.take_step_mean())
            assert layer.threshold.steps == 1
            thresholds.append(layer.threshold.value)
        assert [layer.monitor._count for layer in routed_layers(network)] == [2] * 4
        return gradients(network), [layer.monitor.read() for layer in routed_layers(network)], thresholds, calls.count

    grads, statistics, thresholds, count = step(recompute=False)
    again_grads, again_statistics, again_thresholds, again_count = step(recompute=True)
    assert count == {"decide": 4, "choose": 4, "update": 4, "choose_top": 4}             # 2 layers, 2 micro-batches
    assert again_count == {"decide": 8, "choose": 4, "update": 8, "choose_top": 4}       # the work twice, the choice once
    for name, grad in grads.items():
        assert torch.equal(again_grads[name], grad), name
    assert again_statistics == statistics
    assert again_thresholds == thresholds


def test_a_score_that_comes_out_differently_in_the_recomputation_does_not_change_the_choice(monkeypatch):
    """The second time a gate is computed its order is reversed: tokens and gradients must stay those of the first."""
    def grads(recompute: bool, disturbed: bool) -> dict[str, Tensor]:
        network = make_network(tiny_config(recompute=recompute))
        seen: set[int] = set()
        router = SurpriseRouter.forward

        def forward(self: SurpriseRouter, static: Tensor, change: Tensor) -> Any:
            gate, statistics = router(self, static, change)
            first, _ = id(self) not in seen, seen.add(id(self))
            return (gate if first or not disturbed else gate + 1e3 * torch.arange(24)), statistics

        with monkeypatch.context() as patch:
            patch.setattr(SurpriseRouter, "forward", forward)
            network(TOKENS, LABELS).backward()
        assert len(seen) == 2
        return gradients(network)

    plain, disturbed = grads(False, False), grads(True, True)
    for name, grad in plain.items():
        assert_close(disturbed[name], grad)


# ---- 7: gradients agree with finite differences --------------------------------------------------

class Replay:
    """Holds the moving averages, which carry no gradient, at the values of the first forward pass."""

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []
        self.next: int | None = None

    def __call__(self, x: Tensor, window: int) -> Tensor:
        if self.next is None:
            self.recorded.append(moving_average(x, window))
            return self.recorded[-1]
        self.next += 1
        return self.recorded[self.next - 1]


def signal_config() -> Config:
    return with_routing(tiny_config(num_layers=4), prior_loss_weight=0.0, capacity=0.4)


def test_router_and_prior_gradients_of_the_whole_network_agree_with_finite_differences(monkeypatch):
    replay, chosen = Replay(), []
    choose = dtf.choose_top
    monkeypatch.setattr(dtf, "moving_average", replay)
    monkeypatch.setattr(dtf, "choose_top", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    network = make_network(signal_config())
    tokens, labels = TOKENS[:2], LABELS[:2]
    network(tokens, labels).backward()
    base = [selection.positions.clone() for selection in chosen]
    assert len(base) == len(replay.recorded) == 2

    def loss() -> float:
        replay.next = 0
        chosen.clear()
        value = network(tokens, labels).item()
        assert all(torch.equal(a.positions, b) for a, b in zip(chosen, base, strict=True)), "a choice flipped within eps"
        return value

    eps, generator, checked = 1e-5, torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for param in network.parameters():
            if not {"router", "prior"} & set(param.global_name.split(".")):
                continue
            direction = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param += eps * direction
            above = loss()
            param -= 2 * eps * direction
            below = loss()
            param += eps * direction
            want, found = (above - below) / (2 * eps), (param.grad * direction).sum().item()
            assert abs(want) > 1e-8, f"{param.global_name} has no effect"
            assert found == pytest.approx(want, rel=1e-4, abs=1e-9), param.global_name
            checked += 1
    assert checked == 2 * (4 + 4)
