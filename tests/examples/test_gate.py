"""Forms of routing in one small setting: from runs to rows and their table, and a row made again."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from megadyn.errors import UserError
from tests.docs.commands import load
from tests.examples.test_probe import run_in_crew, write_parts
from tests.helpers.tiny import ROOT


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script; its runs are forked processes."""
    module = load("examples/study/gate.py")
    run_in_crew(module, monkeypatch, at=1)
    return module


def test_the_page_has_the_tables_of_the_committed_rows(gate: ModuleType) -> None:
    """One for each set of overrides."""
    rows = gate.read_rows(ROOT / "examples/study/gate.jsonl", gate.ROW)
    assert rows
    page = (ROOT / "docs/skipping.md").read_text()
    for overrides in {tuple(row["overrides"]) for row in rows}:
        table = gate.table([row for row in rows if tuple(row["overrides"]) == overrides])
        assert table in page, "the page is to say:\n" + table


def test_from_runs_to_rows_and_a_table(
    gate: ModuleType, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parts(tmp_path)
    tiny = [
        f"tokenizer.path={tokenizer_folder}",
        *(f"data.{part}={tmp_path / part}" for part in ("train", "validation")),
        "model.hidden_size=32",
        "model.ffn_size=32",
        "training.sequence_length=8",
        "training.iterations=6",
        "training.global_batch_size=2",
        "training.micro_batch_size=2",
        "training.eval_samples=2",
        "optimizer.warmup_iterations=1",
        "logging.interval=2",
    ]
    forms = ["dtf, both", "dtf, constant offsets", "random"]
    words = ["--output", str(tmp_path), *tiny, "--seeds", "1", "--forms", *forms]
    assert gate.main([*words, "--most", "2"]) == 0
    assert gate.main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["form"] for row in rows] == forms
    both, constant, random = rows
    assert [step["iteration"] for step in both["course"]] == [2, 2, 2, 2, 2, 4, 4, 4, 4, 6]
    assert 0 < both["course"][-1]["gate_routed"] < 1
    multipliers = [step["cu_multiplier"] for step in both["course"]]
    assert len(set(multipliers)) > 1, "it is learned"
    assert {step["cu_multiplier"] for step in constant["course"]} == {1.1}
    assert random["shares"][1] == pytest.approx(0.25) and "gate_routed" not in random["course"][0]
    printed = capsys.readouterr().out
    assert (
        f"| dtf, both | 1 | {both['flops_per_token'] / 1e6:.2f} | {both['loss']:.3f} | {both['loss'] - random['loss']:.3f} | "
        in printed
    )
    assert f"| {both['loss'] - both['topk']:.4f} | 0.250 (" in printed

    validation = tmp_path / "validation.bin"
    tokens = validation.read_bytes()
    validation.write_bytes(tokens[4:] + tokens[:4])
    for more in (["--again", "1"], ["--seeds", "2"]):
        with pytest.raises(
            UserError, match="the text here is .*, but rows are of .*: losses cannot be compared"
        ):
            gate.main([*words, *more])
    validation.write_bytes(tokens)
    assert gate.main([*words, "--again", "1"]) == 0
    assert "dtf, both, seed 1: the same loss" in capsys.readouterr().out
    for wrong, message in (
        (["--again", "4"], "has 3 rows"),
        (["--forms", "dtf, bth"], "did you mean 'dtf, both'"),
    ):
        with pytest.raises(UserError, match=message):
            gate.main(["--output", str(tmp_path), *wrong])
