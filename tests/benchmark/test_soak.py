"""The soak in its short form, and that its bounds can be broken."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megadyn.benchmark import soak
from megadyn.benchmark.soak_bounds import FAIL, WARN, Curves, Soaked, verdicts
from megadyn.errors import UserError

STEPS = {
    "dtf-default/fp32": 220,
    "mod-bce/tensor2": 80,
    "dtrnet-target/fp32": 80,
    "dtrnet-expert/fp32": 80,
    "mod-default/muon": 30,
}
"""Each kind, both precisions (`tensor2` is in bf16), sizes of the tensor group and optimizers. DTF's older form ended in NaN at
step 198 of this run."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Soaked]:
    folder, done = tmp_path_factory.mktemp("soak"), {}
    for case in soak.CASES:
        if case.name in STEPS:
            done |= soak.run_all([case], folder, STEPS[case.name])
    metrics = folder / "cases/dtf-default-fp32/metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    again = soak.run_all([case for case in soak.CASES if case.name == "dtf-default/fp32"], folder, 220)
    assert again == {"dtf-default/fp32": done["dtf-default/fp32"]}
    assert metrics.stat().st_mtime_ns == before, "a case that is done is not run again"
    assert set(json.loads((folder / "soak.json").read_text())) == set(STEPS)
    return done


@pytest.mark.parametrize("name", STEPS)
def test_every_kind_lasts(name: str, found: dict[str, Soaked]) -> None:
    """Shares settle over more steps than these, and losses part: those bounds are the long form's."""
    soaked = found[name]
    broken = [verdict.text for verdict in verdicts(soaked, None, soak.LENGTH) if verdict.level == FAIL]
    assert [text for text in broken if "share" not in text and "causally" not in text] == []
    assert soaked.curves.iterations[-1] == STEPS[name]
    assert soaked.curves.loss[-1] < soaked.curves.loss[0] - 0.5


# ---- bounds --------------------------------------------------------------------------------------

LAYER = {
    "routed_fraction": [0.5, 0.5],
    "causal_fraction": [0.45, 0.5],
    "causal_agreement": [0.6, 0.9],
    "gate_routed": [0.6, 0.7],
    "gate_unrouted": [0.4, 0.3],
    "ce_log_offset": [0.0, -3.0],
    "threshold": [0.5, 0.7],
}


def soaked(
    rule: str = "dtf-default",
    share: float | None = 0.5,
    loss: float = 1.5,
    ended: str = "",
    **layer: list[float],
) -> Soaked:
    curves = Curves([50, 100], [3.0, loss], [1.0, 1.0], {"1": LAYER | layer}, {"topk": 1.6, "causal": 1.7})
    return Soaked(
        f"{rule}/fp32", rule, share, 100, curves, 1.0, ended, follows=rule not in ("mod-bce", "dense-half")
    )


HALF = soaked("dense-half", None, loss=1.6)


def levels(case: Soaked) -> dict[str, str]:
    return {
        verdict.text: verdict.level for verdict in verdicts(case, HALF, 64) if verdict.level in (FAIL, WARN)
    }


def test_a_sound_run_breaks_nothing() -> None:
    assert levels(soaked()) == {}


@pytest.mark.parametrize(
    ("case", "level", "text"),
    [
        (soaked(ended="error: NaN"), FAIL, "error: NaN"),
        (replace(soaked(), steps=200), FAIL, "the last record is not of step 200"),
        (soaked(loss=math.nan), FAIL, "a value is not finite"),
        (soaked(ce_log_offset=[0.0, -101.0]), FAIL, "layer 1: ce_log_offset reached 101"),
        (soaked(routed_fraction=[0.5, 0.4]), FAIL, "layer 1: share 0.400, planned 0.5"),
        (
            soaked("dtrnet-target", 0.2, routed_fraction=[0.9, 0.31]),
            FAIL,
            "layer 1: share 0.310, planned 0.2",
        ),
        (soaked(gate_routed=[0.5, 1e-5]), FAIL, "layer 1: gate of chosen tokens 1e-05, of others 0.3"),
        (
            soaked(gate_routed=[0.5, 1.0], gate_unrouted=[0.5, 1.0]),
            FAIL,
            "layer 1: gate of chosen tokens 1, of others 1",
        ),
        (
            soaked(gate_routed=[0.5, 0.05], gate_unrouted=[0.5, 0.02]),
            WARN,
            "layer 1: gate of chosen tokens 0.05, of others 0.02",
        ),
        (
            replace(soaked(gate_routed=[0.5, 1e-5]), is_chance=True),
            WARN,
            "layer 1: chance to be chosen of chosen tokens 1e-05, of others 0.3",
        ),
        (
            replace(soaked(share=0.9), in_mean=True, is_exact=False),
            FAIL,
            "all layers: share 0.500, planned 0.9",
        ),
        (soaked(gate_routed=[0.5, 0.31]), WARN, "layer 1: gate of chosen tokens 0.31, of others 0.3"),
        (soaked(causal_fraction=[0.5, 0.2]), FAIL, "layer 1: 0.200 of tokens routed causally, planned 0.5"),
        (
            soaked("mod-bce", causal_fraction=[0.5, 0.2]),
            WARN,
            "layer 1: 0.200 of tokens routed causally, planned 0.5",
        ),
        (soaked(causal_agreement=[0.5, 0.51]), WARN, "layer 1: causal agreement 51.0%, 50.0% by chance"),
        (soaked(loss=1.61), FAIL, "loss 1.610, 1.600 at half the depth"),
    ],
)
def test_each_bound_can_be_broken(case: Soaked, level: str, text: str) -> None:
    assert levels(case).get(text) == level


def test_layers_held_to_their_mean_share_may_differ() -> None:
    case = replace(soaked(), in_mean=True, is_exact=False)
    case.curves.layers["3"] = LAYER | {"routed_fraction": [0.5, 0.1]}
    case.curves.layers["5"] = LAYER | {"routed_fraction": [0.5, 0.9]}
    assert levels(case) == {}


def test_the_table_counts_what_is_broken_and_the_page_says_what_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from megadyn.benchmark.soak_page import LINES, write_page

    assert set(LINES) == set(soak.SETUPS)
    found = {
        case.name: case for case in (HALF, soaked(loss=1.7), soaked("mod-bce", causal_fraction=[0.5, 0.2]))
    }
    text, broken = soak.table(found)
    assert broken == 1
    assert (
        "| dtf-default/fp32 | 1.700 | 1.600 | FAIL loss 1.700, 1.600 at half the depth |" in text.splitlines()
    )
    write_page(found, tmp_path / "page", text, "python tools/benchmark.py soak")
    page = (tmp_path / "page.md").read_text()
    assert text in page
    assert "- **mod-bce/fp32**: loss 3 to 1.5; share 0.5 to 0.5; gate of chosen tokens 0.6 to 0.7;" in page
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


# ---- cases ---------------------------------------------------------------------------------------


def test_names_choose_cases_and_their_controls() -> None:
    def names(*words: str) -> list[str]:
        return [case.name for case in soak.chosen(words)]

    assert names() == [case.name for case in soak.CASES]
    assert names("mod-bce/bf16") == ["dense/bf16", "dense-half/bf16", "mod-bce/bf16"]
    every = [
        f"{rule}/{setup}"
        for setup in ("fp32", "bf16", "tensor2")
        for rule in (
            "dense",
            "dense-half",
            *(rule for rule in soak.RULES if rule.startswith("dtf-")),
            "mod-bce",
        )
    ]
    assert names("dtf", "mod-bce") == [*every, "dense/muon", "dense-half/muon", "dtf-default/muon"]
    with pytest.raises(
        UserError, match="--cases moe: no such case; there are dense, dense-half, dtf-default"
    ):
        names("moe")
