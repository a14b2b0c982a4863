"""Warnings of routers that stopped working: each from the statistics that show it, and through a real run."""

import json
import re
from pathlib import Path

import pytest

from megadyn.log import log
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.telemetry.router_health import (
    CHECKS,
    CLOSED_GATE,
    LEAST_KAPPA,
    PERSISTENCE,
    SHARE_FACTOR,
    RouterHealth,
    chance_agreement,
    settled_at,
)
from megadyn.telemetry.telemetry import Telemetry
from tests.helpers.crew import Crew
from tests.helpers.networks import with_routing
from tests.helpers.tiny import ROOT, tiny_config

HEALTHY = {
    "routed_fraction": 0.5,
    "gate_routed": 0.8,
    "gate_routed_std": 0.1,
    "gate_unrouted": 0.3,
    "causal_agreement": 0.9,
}
SETTLED = 100


def shown_by(health: RouterHealth, reports: int = PERSISTENCE, **changes: float) -> list[str]:
    found = []
    for report in range(reports):
        found += health.look(SETTLED + 10 * (1 + report), {1: HEALTHY | changes, 0: {"prior_loss": 1.0}})
    return [finding.problem for finding in found]


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("dtf", {}, None),
        ("dtf", {"gate_routed": 0.0, "gate_unrouted": 0.0}, "dead_gate"),
        ("dtf", {"gate_routed": 0.99 * CLOSED_GATE, "gate_unrouted": 0.02}, "closed_gate"),
        ("dtf", {"gate_routed": 1.01 * CLOSED_GATE, "gate_unrouted": 0.02}, None),
        ("dtf", {"gate_routed": 1.0, "gate_unrouted": 0.995}, "saturated_gate"),
        ("dtf", {"gate_routed": 1.0, "gate_unrouted": 0.95}, None),
        ("dtf", {"gate_routed": 0.51, "gate_unrouted": 0.50}, "unseparated_scores"),
        ("dtf", {"gate_routed": 0.53, "gate_unrouted": 0.50}, None),
        ("dtf", {"causal_agreement": 0.5 + 0.49 * LEAST_KAPPA}, "chance_choice"),
        ("dtf", {"causal_agreement": 0.5 + 0.51 * LEAST_KAPPA}, None),
        ("dtf", {"causal_agreement": 0.2}, "chance_choice"),
        (
            "dtf",
            {"gate_routed": float("nan"), "gate_unrouted": float("nan"), "routed_fraction": float("nan")},
            None,
        ),
        (
            "mod-predictor",
            {"gate_routed": 0.5, "gate_routed_std": 0.1, "gate_unrouted": -0.5, "routed_fraction": 0.3},
            None,
        ),
        (
            "mod-predictor",
            {"gate_routed": 0.01, "gate_routed_std": 0.01, "gate_unrouted": -0.5, "routed_fraction": 0.3},
            "closed_gate",
        ),
        (
            "mod-predictor",
            {"gate_routed": 2.0, "gate_unrouted": 1.97, "routed_fraction": 0.3},
            "unseparated_scores",
        ),
        ("dtrnet-token", {"routed_fraction": 0.1}, None),
        ("dtrnet-token", {"routed_fraction": 0.099 / SHARE_FACTOR}, "strayed_share"),
        ("dtrnet-token", {"routed_fraction": 0.101 * SHARE_FACTOR}, "strayed_share"),
        # no token: its gate says nothing
        ("dtrnet-token", {"routed_fraction": 0.0, "gate_routed": 0.0}, "strayed_share"),
        ("dtrnet-expert", {"gate_routed": 0.0, "gate_unrouted": 0.0, "routed_fraction": 0.4}, "dead_gate"),
    ],
)
def test_each_problem_is_told_by_its_own_name_and_at_its_bound(kind, changes, problem):
    """Capacity is 0.5 for dtf, 0.3 for mod, 0.1 for token choice; sequences have 24 tokens."""
    health = RouterHealth(tiny_config(kind))
    if kind == "dtrnet-token":
        changes = {"causal_agreement": 1.0} | changes
    assert shown_by(health, **changes) == ([problem] if problem else [])


def test_the_mean_share_is_told_once_of_layers_that_are_held_to_it():
    health = RouterHealth(tiny_config("subskip"))
    for layers, told in ((("0.9", "0.1"), []), (("0.1", "0.2"), ["strayed_share"])):
        statistics = {
            layer: HEALTHY | {"causal_agreement": 1.0, "routed_fraction": float(share)}
            for layer, share in enumerate(layers)
        }
        found = []
        for report in range(PERSISTENCE):
            found += health.look(SETTLED + 10 * (1 + report), statistics)
        assert [finding.problem for finding in found] == told


def test_when_all_tokens_attend_with_certainty_the_share_and_the_gate_are_told():
    health = RouterHealth(tiny_config("dtrnet-token"))
    found = shown_by(health, routed_fraction=1.0, gate_routed=1.0, gate_unrouted=0.0)
    assert found == ["saturated_gate", "strayed_share"]


def test_chance_follows_from_the_capacity():
    assert chance_agreement(0.5) == 0.5
    assert chance_agreement(0.1) == pytest.approx(0.82)
    health = RouterHealth(with_routing(tiny_config("mod"), capacity=0.125))
    few = {"routed_fraction": 0.125, "causal_agreement": 0.8}  # much, for a choice of one half
    assert shown_by(health, **few) == ["chance_choice"]


def test_a_problem_is_told_once_and_only_where_it_stays():
    health = RouterHealth(tiny_config("dtf"))
    assert shown_by(health, PERSISTENCE - 1, gate_routed=0.05, gate_unrouted=0.01) == []
    assert shown_by(health, 1) == []  # well again: the count begins anew
    assert shown_by(health, PERSISTENCE - 1, gate_routed=0.05, gate_unrouted=0.01) == []
    assert shown_by(health, 1, gate_routed=0.05, gate_unrouted=0.01) == ["closed_gate"]
    assert shown_by(health, 20, gate_routed=0.04, gate_unrouted=0.01) == []
    assert [re.sub(r"\d{3}", "N", line) for line in health.summary()] == [
        f"layer 1: its gate is closed (mean 0.N over chosen tokens, below {CLOSED_GATE}): it is computed but hardly used, "
        "since iteration N"
    ]
    assert "mean 0.040" in health.summary()[0]
    shown_by(health, 1)
    assert health.summary()[0].endswith("(no longer at the last report)")


def test_nothing_is_told_before_averages_have_settled_nor_of_reports_before_a_rollback():
    config = tiny_config("dtf")
    assert settled_at(config) == SETTLED  # 1 / (1 - threshold_momentum)
    assert settled_at(with_routing(tiny_config("dtrnet-token"), aux_loss_warmup=700)) == 700
    health = RouterHealth(config)
    for iteration in range(1, SETTLED + 1):
        assert not health.look(iteration, {1: HEALTHY | {"gate_routed": 0.0}})
    assert shown_by(health, PERSISTENCE - 1, gate_routed=0.0, gate_unrouted=0.0) == []
    health.go_back()
    assert shown_by(health, PERSISTENCE - 1, gate_routed=0.0, gate_unrouted=0.0) == []


def test_warnings_go_into_the_log_and_the_metrics(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    config = tiny_config("dtf", iterations=1000)
    config.logging.tensorboard = False
    telemetry = Telemetry(config, 1, tmp_path, 0)
    for step in range(110, 110 + 10 * PERSISTENCE, 10):
        telemetry.train(
            step,
            consumed_samples=step,
            consumed_tokens=24 * step,
            lm_loss=2.0,
            grad_norm=1.0,
            learning_rate=1e-3,
            routing={1: HEALTHY | {"causal_agreement": 0.55}},
        )
    telemetry.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (warned,) = (record for record in records if "router_warning" in record)
    sentence = "layer 1: its causal rule agrees with top-k on 55% of tokens, but chance alone gives 50%, since iteration 110"
    assert warned == {
        "iteration": 150,
        "router_warning": {
            "layer": 1,
            "problem": "chance_choice",
            "since": 110,
            "value": 0.55,
            "sentence": sentence,
        },
    }
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        sentence,
        f"at the end: {sentence}",
    ]


# ---- through real runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset of bytes."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "corpus.jsonl").write_text(json.dumps({"text": (ROOT / "LICENSE").read_text()}) + "\n")
    preprocess(Corpus([folder / "corpus.jsonl"]), "byte", folder / "bytes", append_eod=True)
    return folder / "bytes"


ROUTINGS = {
    "closed_gate": "kind: dtf, ce_log_offset_init: -2, cu_multiplier_init: 2, beta_cu_init: 4, beta_ce_init: 4",
    "dead_gate": "kind: dtf, ce_log_offset_init: -30, cu_multiplier_init: 30, beta_cu_init: 4, beta_ce_init: 4",
    "saturated_gate": "kind: dtf, ce_log_offset_init: 30, beta_ce_init: 4",
    "unseparated_scores": "kind: dtf, beta_ce_init: -30, beta_cu_init: -30",
    "strayed_share": "kind: dtrnet, aux_loss_lambda: 0, safe_min_attn_ratio: 0",
    "chance_choice": "kind: mod, causal: bce, bce_loss_weight: 0",
}
"""By the problem that they bring about, which a tiny learning rate then leaves alone."""


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_real_run_warns(name: str, saved_text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"""
model: {{hidden_size: 16, num_layers: 2, num_heads: 2, init_std: 0.3, routing: {{threshold_momentum: 0, {ROUTINGS[name]}}}}}
data: {{train: {saved_text}, validation_fraction: 0}}
tokenizer: {{path: byte}}
training: {{iterations: {PERSISTENCE + 2}, global_batch_size: 2, sequence_length: 16}}
optimizer: {{warmup_iterations: 0, learning_rate: 1.0e-6, min_learning_rate: 0}}
checkpoint: {{interval: 0}}
logging: {{tensorboard: false, interval: 1}}
precision: fp32
deepspeed_config: {ROOT}/ds_configs/zero1.json
output_dir: {tmp_path}/out
""")
    crew = Crew(tmp_path / "config.yaml")
    assert crew.wait() == [0], crew.output()
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    found = [record["router_warning"] for record in records if "router_warning" in record]
    assert name in {warning["problem"] for warning in found}, [record.get("routing") for record in records][
        -1
    ]
    for warning in found:
        assert warning["problem"] in CHECKS
        assert crew.output().count(f"{warning['sentence']}\n") >= 1
        assert f"at the end: layer {warning['layer']}: " in crew.output()
    assert len({(warning["layer"], warning["problem"]) for warning in found}) == len(found)
