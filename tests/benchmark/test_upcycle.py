"""A dense model and what it becomes: in short, and how a run is judged."""

import json
import re
from pathlib import Path

import pytest

from megadyn.benchmark import soak, upcycle
from megadyn.benchmark.upcycle import Regained, as_table, judged
from megadyn.errors import UserError
from megadyn.kinds import BUILT_IN, DENSE
from tests.helpers.tiny import ROOT


def test_a_dense_model_is_trained_exported_and_upcycled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = soak.prepare(tmp_path)
    upcycle.main(
        [
            f"--config={config}",
            "--dense-steps=4",
            "--steps=2",
            "--cases=mod-default",
            f"--output={tmp_path / 'upcycle'}",
            "--json",
            "precision=fp32",
            f"deepspeed_config={tmp_path}/fp32.json",
        ]
    )
    table, _, record = capsys.readouterr().out.strip().rpartition("\n")
    dense, mod = (Regained(**found) for found in json.loads(record))
    assert (dense.case, dense.share, dense.regained) == ("dense", 1.0, 0)
    assert (mod.case, mod.share) == ("mod-default", 0.125)
    # The same weights, but only an eighth of the tokens pass the routed layers.
    assert mod.start == pytest.approx(dense.start, abs=0.5) and mod.start != dense.start
    assert table.count("\n") == 3


def test_regained_is_the_first_evaluation_no_worse_than_the_dense_model_was() -> None:
    losses = {"topk": {0: 3.0, 10: 2.5, 20: 2.0, 30: 2.1}, "causal": {0: 3.5, 10: 3.0, 20: 2.8, 30: 2.6}}
    found = judged("mod-default", 0.125, losses, wanted=2.5)
    assert found == Regained("mod-default", 0.125, 3.0, 3.5, 10, None, 2.1, 2.6)
    assert as_table([found]).splitlines()[-1] == (
        "| mod-default | 0.125 | 3.000 / 3.500 | 10 / not yet | 2.100 / 2.600 |"
    )


def test_an_unknown_case_is_one_sentence() -> None:
    with pytest.raises(UserError, match="--cases: no case 'modd'; there are dtf-default"):
        upcycle.parse_args(["--cases", "dtf-default,modd"])


PAGE = (ROOT / "benchmarks/upcycle.md").read_text()
ROW = re.compile(r"^\| (\w+)-default \| [\d.]+ \| ([\d.]+) / ([\d.]+) \| (\d+) / (\d+) \|", re.MULTILINE)
DENSE_START = re.compile(r"^\| dense \| 1 \| ([\d.]+) / ([\d.]+) \|", re.MULTILINE)


def sentence_of(row: re.Match[str]) -> str:
    """What the page of a kind says, by the table of the measurement."""
    before = DENSE_START.search(PAGE)
    assert before is not None
    lost = [
        float(after) - float(start) for after, start in zip(row.groups()[1:3], before.groups(), strict=True)
    ]
    rose = [f"{loss:.3f}" for loss in lost]
    change = "did not rise" if max(lost) < 0.0015 else f"rose by {either(*rose, 'with top-k', 'causally')}"
    regained = (
        ""
        if row[4] == row[5] == "0"
        else f"; it was regained after {either(row[4], row[5])} steps of 1,024 tokens"
    )
    return (
        f"The loss of a small dense model {change} at step 0, when it became one of this kind with its default "
        f"settings{regained} (`benchmarks/upcycle.md`)."
    )


def either(one: str, other: str, by: str = "", by_other: str = "") -> str:
    return (
        one
        if one == other
        else " and ".join(f"{value} {way}".strip() for value, way in ((one, by), (other, by_other)))
    )


def test_the_page_of_each_kind_says_what_upcycling_loses() -> None:
    rows = {row[1]: row for row in ROW.finditer(PAGE)}
    assert rows.keys() == {*BUILT_IN} - {DENSE}
    for kind, row in rows.items():
        text = " ".join((ROOT / f"megadyn/kinds/{kind}/README.md").read_text().split())
        assert f"## Upcycling {sentence_of(row)}" in text, f"{kind} is to say:\n{sentence_of(row)}"
