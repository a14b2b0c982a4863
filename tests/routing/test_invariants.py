"""What `routing.md` promises of every routed model: invariants 1, 2, 3, 5, 6 and 7. (4 needs ranks: test_ranks_agree.)"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megadyn.config import Config
from megadyn.kinds.dtf.layers import DecisionLayer
from megadyn.kinds.dtrnet import layers as dtrnet
from megadyn.kinds.dtrnet.layers import DtrLayer
from megadyn.kinds.stt.layers import SubjectiveLayer
from megadyn.network import Network, routed_layers, set_routing_mode, thresholds_of
from megadyn.routing import choice, surprise
from megadyn.routing import layer as routed_layer
from megadyn.routing.choice import CausalRouter, LinearRouter, TwoLayerRouter
from megadyn.routing.layer import SkippingLayer, attach_loss
from megadyn.routing.surprise import SurpriseRouter, moving_average
from tests.helpers.networks import end_step, gradients, known, loads_of, make_network, with_routing
from tests.helpers.tiny import KINDS, tiny_config, tiny_tokens

SAMPLES = tiny_tokens(1)[0]
TOKENS, LABELS = SAMPLES[:, :-1], SAMPLES[:, 1:]
ROUTED = [kind for kind in KINDS if kind != "dense"]
OWN_CHOICE = ("nested", "subskip", "skip_middle")
"""Kinds in which each token chooses, by a rule without a capacity: their own tests and the conformance suite open their gates."""
BY_TOPK = [
    kind for kind in ROUTED if tiny_config(kind).model.routing.has_topk and not kind.startswith("fixed")
]
NORMS = ["pre", "lns", "hybridnorm"]


def ready(config: Config) -> Network:
    """After one step's observations, so that a threshold routes some tokens and skips others."""
    network = make_network(config)
    network(TOKENS, LABELS)
    end_step(network)
    for layer in routed_layers(network):
        layer.monitor.read()
    return network


def assert_it_chooses(network: Network) -> None:
    """Since the last reading no layer took all tokens, or none: else a test shows nothing."""
    for layer in routed_layers(network):
        if not isinstance(layer, DecisionLayer):
            assert 0.05 < layer.monitor.read()["routed_fraction"] < 0.95, f"layer {layer.index}"


# ---- 1: with everything routed at full weight the stack is dense ---------------------------------


def open_all_gates(patch: pytest.MonkeyPatch, kind: str) -> None:
    """Every gate (1 - exp(-r)), and p0, is exactly one from now on, and every causal rule takes every token."""
    logit = 1.0 if KINDS[kind].get("gate") == "identity" else 60.0  # sigmoid(60) is 1 in float64
    patch.setattr(
        SurpriseRouter, "forward", lambda self, static, change, documents: (torch.full_like(static, 60.0), {})
    )
    patch.setattr(LinearRouter, "forward", lambda self, hidden: torch.full_like(hidden[..., 0], logit))
    patch.setattr(
        TwoLayerRouter,
        "forward",
        lambda self, hidden: torch.tensor([60.0, -60.0]).to(hidden).expand(*hidden.shape[:2], 2),
    )
    patch.setattr(CausalRouter, "predict", lambda self, hidden: torch.ones_like(hidden[..., 0]))


@pytest.mark.parametrize("mode", ["topk", "causal"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("kind", "num_layers"), [*((kind, 4) for kind in ROUTED if kind not in OWN_CHOICE), ("dtf", 5)]
)
def test_full_capacity_and_gates_of_one_equal_the_dense_stack(monkeypatch, kind, num_layers, norm, mode):
    """In causal mode the capacity stays below one where the rule can take all tokens all the same."""
    dense = make_network(tiny_config("dense", num_layers=num_layers, normalization=norm))
    config = tiny_config(kind, num_layers=num_layers, normalization=norm)
    routed = make_network(
        with_routing(config, capacity=1.0) if mode == "topk" or kind.startswith("fixed") else config
    )
    set_routing_mode(routed_layers(routed), mode)
    with torch.no_grad():
        assert kind.startswith("fixed") or not torch.allclose(routed(TOKENS), dense(TOKENS), atol=1e-3)
    open_all_gates(monkeypatch, kind)
    logits, reference = routed(TOKENS), dense(TOKENS)
    assert_close(logits, reference)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.backward(grad)
    reference.backward(grad)
    found = {p.global_name: p.grad for p in routed.parameters() if p.grad is not None}
    for name, want in gradients(dense).items():
        assert_close(found[name], want)


# ---- 2: sequences of a batch do not see each other -----------------------------------------------


def assert_rows_stand_alone(network: Network) -> None:
    together = network(TOKENS)
    for row in range(len(TOKENS)):
        assert_close(together[row : row + 1], network(TOKENS[row : row + 1]))
    assert_close(network(TOKENS.flip(0)), together.flip(0))
    changed = TOKENS.clone()
    changed[1:] = changed[1:].flip(1)
    assert_close(network(changed)[0], together[0])
    assert not torch.allclose(network(changed)[1], together[1])


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        *((kind, "pre") for kind in ROUTED if kind != "skip_middle"),
        ("mod", "hybridnorm"),
        ("dtrnet-token", "hybridnorm"),
        ("dtrnet-expert", "lns"),
    ],
)
@pytest.mark.parametrize("mode", ["topk", "causal"])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(mode, kind, norm):
    network = ready(tiny_config(kind, normalization=norm))
    set_routing_mode(routed_layers(network), mode)
    with torch.no_grad():
        assert_rows_stand_alone(network)
    assert_it_chooses(network)


def test_nor_does_it_where_short_choices_are_filled_up_in_training():
    network = make_network(with_routing(tiny_config("dtrnet-token"), safe_min_attn_ratio=0.3))
    network(TOKENS)
    for layer in routed_layers(network):
        assert 0 < layer.monitor.read()["refills"] < 4, f"some sequences of layer {layer.index}, not all"
    assert_rows_stand_alone(network)


# ---- 3: the causal rule does not look at the future ----------------------------------------------


def reach_of_the_future(network: Network, mode: str) -> float:
    """How much the logits of earlier tokens change when later tokens change, at most."""
    set_routing_mode(routed_layers(network), mode)
    worst = 0.0
    before = network(TOKENS).detach()
    for t in (1, 7, 12, 18, 23):
        changed = TOKENS.clone()
        changed[:, t:] = (changed[:, t:] + 17) % 61
        after = network(changed).detach()
        assert not torch.allclose(after[:, t], before[:, t])
        worst = max(worst, (after[:, :t] - before[:, :t]).abs().max().item())
    return worst


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", BY_TOPK)
@torch.no_grad()
def test_the_causal_rule_does_not_look_at_the_future_and_topk_does(kind, norm):
    with torch.enable_grad():
        network = ready(tiny_config(kind, normalization=norm))
    assert reach_of_the_future(network, "causal") < 1e-10
    assert_it_chooses(network)
    assert reach_of_the_future(network, "topk") > 1e-4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["topk", "causal"])
@pytest.mark.parametrize("norm", NORMS)
def test_token_choice_looks_at_the_future_in_no_mode(norm, mode, training):
    network = make_network(
        with_routing(tiny_config("dtrnet-token", normalization=norm), safe_min_attn_ratio=0.0)
    )
    with torch.set_grad_enabled(training):
        assert reach_of_the_future(network, mode) < 1e-10
    assert_it_chooses(network)


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_a_dense_stack_does_not_look_at_the_future(norm):
    assert reach_of_the_future(make_network(tiny_config("dense", normalization=norm)), "topk") < 1e-10


# ---- 5 and 6: recomputation ----------------------------------------------------------------------


class Calls:
    """Counts the calls of functions that are patched through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.count = monkeypatch, {}

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)
        label = f"{owner.__name__.rpartition('.')[2]}.{name}"
        self.count[label] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count[label] += 1
            return function(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, counted)


WORK = (
    (DecisionLayer, "decide"),
    (SkippingLayer, "update"),
    (DtrLayer, "attend_or_pass"),
    (SubjectiveLayer, "surprise"),
)
DECISIONS = (
    (CausalRouter, "forward"),
    (CausalRouter, "predict"),
    (DtrLayer, "choice"),
    (LinearRouter, "forward"),
    (TwoLayerRouter, "forward"),
    (choice, "choose_top"),
    (dtrnet, "choose_top"),
)


COUNTED = ("dtf", "dtf-predictor", "mod", "mod-predictor", "mod-bce", "dtrnet-token", "dtrnet-expert")
"""Kinds whose calls are counted by name. The conformance suite holds every kind to the same gradients and statistics."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        *((kind, "pre") for kind in COUNTED),
        ("dtf", "hybridnorm"),
        ("dtrnet-token", "lns"),
        ("dtrnet-expert", "hybridnorm"),
    ],
)
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_reuses_the_decisions_and_changes_no_bit(monkeypatch, kind, norm, dtype, recompute):
    """Two micro-batches of one step, with and without; DTRNet with jitter and with choices filled up."""
    calls = Calls(monkeypatch)
    for owner, name in (*WORK, *DECISIONS):
        calls.watch(owner, name)

    def step(recompute: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[Any], dict[str, int]]:
        calls.count = dict.fromkeys(calls.count, 0)
        config = tiny_config(kind, recompute=recompute, normalization=norm)
        config = with_routing(config, **known(config, jitter=0.2, safe_min_attn_ratio=0.5))
        network = make_network(config, dtype=dtype, loss_scale=0.5)
        for part in SAMPLES.split(2):
            (network(part[:, :-1], part[:, 1:]) * 0.5).backward()
        layers = routed_layers(network)
        trackers = [*thresholds_of(layers).values(), *loads_of(layers).values()]
        assert [tracker.micro_batches for tracker in trackers] == [2] * len(trackers)
        end_step(network)
        assert [tracker.steps for tracker in trackers] == [1] * len(trackers)
        recorded = [layer.monitor._found for layer in layers]
        counts = [
            int(found["D_st" if "D_st" in found else "routed_fraction"].parts[-1]) for found in recorded
        ]
        assert counts == [2] * len(layers), "once per micro-batch, also where it is recomputed"
        return (
            gradients(network),
            [layer.monitor.read() for layer in layers],
            [tracker.state() for tracker in trackers],
            dict(calls.count),
        )

    grads, statistics, trackers, count = step("none")
    again_grads, again_statistics, again_trackers, again_count = step(recompute)
    calls_of_work = {f"{owner.__name__}.{name}" for owner, name in WORK}
    times = 2 if recompute == "full" else 1
    assert again_count == {name: times * n if name in calls_of_work else n for name, n in count.items()}
    per_layer = {name: n / 2 for name, n in count.items() if n}  # of one micro-batch
    assert per_layer == expected_calls(kind)
    for name, grad in grads.items():
        assert torch.equal(again_grads[name], grad), name
    assert again_statistics == statistics
    assert again_trackers == trackers
    assert (kind in ("dtf", "mod", "dtrnet-token", "dtrnet-expert")) == bool(trackers), (
        "trackers of this kind"
    )


def expected_calls(kind: str) -> dict[str, int]:
    """Calls in one micro-batch: two routed layers of four, three in `dtrnet-expert`."""
    layers = 3 if kind == "dtrnet-expert" else 2
    family, _, variant = kind.partition("-")
    if family == "dtrnet":
        chosen = (
            ["CausalRouter.forward", "choice.choose_top"] if variant == "expert" else ["layers.choose_top"]
        )
        names = ["DtrLayer.attend_or_pass", "DtrLayer.choice", "TwoLayerRouter.forward", *chosen]
    else:
        names = [
            "SubjectiveLayer.surprise" if family == "stt" else "SkippingLayer.update",
            "CausalRouter.forward",
            "choice.choose_top",
        ]
        names += {"dtf": ["DecisionLayer.decide"], "mod": ["LinearRouter.forward"]}.get(family, [])
        names += ["CausalRouter.predict"] if variant == "predictor" or family == "stt" else []
    return dict.fromkeys(names, layers)


@pytest.mark.parametrize("kind", ["dtf", "dtf-predictor"])
def test_a_score_that_comes_out_differently_in_the_recomputation_does_not_change_the_choice(
    monkeypatch, kind
):
    """The second time a score is computed its order is reversed: tokens and gradients must stay those of the first."""

    def grads(recompute: str, disturbed: bool) -> dict[str, Tensor]:
        network = make_network(tiny_config(kind, recompute=recompute))
        seen: set[int] = set()
        router = SurpriseRouter.forward

        def forward(self: SurpriseRouter, static: Tensor, change: Tensor, documents: Any) -> Any:
            score, statistics = router(self, static, change, documents)
            first, _ = id(self) not in seen, seen.add(id(self))
            return (score if first or not disturbed else score + 1e3 * torch.arange(24)), statistics

        with monkeypatch.context() as patch:
            patch.setattr(SurpriseRouter, "forward", forward)
            network(TOKENS, LABELS).backward()
        assert len(seen) == 2
        return gradients(network)

    plain, disturbed = grads("none", False), grads("full", True)
    for name, grad in plain.items():
        assert_close(disturbed[name], grad)


# ---- 7: gradients agree with finite differences --------------------------------------------------


class Objective:
    """The network's loss with all that is attached to it on the way, as a number that finite differences can be taken of.

    Moving averages, which carry no gradient, keep the values of the first pass; a choice that changes fails the test.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
        self.network = network
        self.attached: list[float] = []
        self.choices: list[Tensor] = []
        self.averages: list[Tensor] = []
        self.first: tuple[list[Tensor], list[Tensor]] | None = None
        for owner in (routed_layer, dtrnet):
            monkeypatch.setattr(owner, "attach_loss", self.attach)
        monkeypatch.setattr(surprise, "moving_average", self.average)
        for owner, name in ((CausalRouter, "forward"), (DtrLayer, "choice")):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def attach(self, activation: Tensor, loss: Tensor, scale: float) -> Tensor:
        self.attached.append(loss.item() * scale)
        return attach_loss(activation, loss, scale)

    def average(self, x: Tensor, window: int, documents: Any) -> Tensor:
        self.averages.append(
            moving_average(x, window, documents) if self.first is None else self.first[1][len(self.averages)]
        )
        return self.averages[-1]

    def watched(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            found = choose(*args)
            self.choices.append(found[0].places)
            return found

        return wrapper

    def __call__(self) -> Tensor:
        self.attached, self.choices, self.averages = [], [], []
        for load in loads_of(routed_layers(self.network)).values():
            load.micro_batches = 0  # the jitter's seed
        loss = self.network(TOKENS[:2], LABELS[:2])
        if self.first is None:
            self.first = self.choices, self.averages
        assert all(map(torch.equal, self.choices, self.first[0])), "a choice flipped within eps"
        return loss

    def number(self) -> float:
        return self().item() + sum(self.attached)


AUXILIARY = {
    "bce_loss_weight": 0.3,
    "z_loss_weight": 0.2,
    "aux_loss_lambda": 0.4,
    "jitter": 0.2,
    "entropy_bonus": 0.3,
    "safe_min_attn_ratio": 0.5,
}


def check_by_differences(monkeypatch: pytest.MonkeyPatch, config: Config, only: set[str]) -> set[str]:
    """Of every parameter with one of `only` in its name, a random direction; the names, without their layers."""
    network = make_network(config, loss_scale=0.7)
    objective = Objective(monkeypatch, network)
    objective().backward()
    eps, generator, checked = 1e-5, torch.Generator().manual_seed(0), []
    for param in network.parameters():
        parts = param.global_name.split(".")
        if not only & set(parts):
            continue
        direction = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        start = param.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                param.copy_(start + sign * eps * direction)
            values.append(objective.number())
        with torch.no_grad():
            param.copy_(start)
        want, found = (values[0] - values[1]) / (2 * eps), (param.grad * direction).sum().item()
        assert abs(want) > 1e-8, f"{param.global_name} has no effect"
        assert found == pytest.approx(want, rel=1e-4, abs=1e-9), param.global_name
        checked.append(".".join(parts[3:]))
    layers = config.model.layer_types.count(config.model.layer_types[-1])
    assert len(checked) == layers * len(set(checked))
    return set(checked)


ROUTER_PARAMETERS = {
    "dtf": {
        *(f"router.{name}" for name in ("beta_ce", "beta_cu", "ce_log_offset", "cu_multiplier")),
        *(f"prior.{name}.weight" for name in ("norm", "gate_proj", "up_proj", "down_proj")),
    },
    "mod": {"router.weight"},
    "dtrnet": {f"router.{fc}.{part}" for fc in ("fc1", "fc2") for part in ("weight", "bias")},
}


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        *((kind, "pre") for kind in ROUTED if kind.partition("-")[0] in ROUTER_PARAMETERS),
        ("dtf", "hybridnorm"),
        ("mod", "lns"),
        ("dtrnet-token", "hybridnorm"),
    ],
)
def test_router_and_prior_gradients_of_the_whole_network_agree_with_finite_differences(
    monkeypatch, kind, norm
):
    """Without the losses whose targets are held constant: the prior's and the predictor's."""
    config = tiny_config(kind, normalization=norm)
    config = with_routing(
        config, **known(config, prior_loss_weight=0.0, predictor_loss_weight=0.0, capacity=0.4, **AUXILIARY)
    )
    assert (
        check_by_differences(monkeypatch, config, {"router", "prior"})
        == ROUTER_PARAMETERS[config.model.routing.kind]
    )


@pytest.mark.parametrize("kind", ["dtf-predictor", "mod-predictor"])
def test_predictor_gradients_agree_with_finite_differences(monkeypatch, kind):
    config = with_routing(tiny_config(kind), predictor_loss_weight=0.6, capacity=0.4)
    assert check_by_differences(monkeypatch, config, {"causal_router"}) == {
        f"causal_router.{fc}.weight" for fc in ("fc1", "fc2")
    }
