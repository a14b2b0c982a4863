"""The probe from generation to figures, with tiny models; a row that is there is not made again, and can be checked."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megadyn.config import load_config
from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.labels import read_labels
from megadyn.errors import ConfigError, UserError
from megadyn.evaluation.losses import evaluate
from megadyn.planning.flops import training_flops
from megadyn.prepare import probe as language
from megadyn.routing.recording import Recording
from megadyn.training.data import open_data
from tests.docs.commands import load
from tests.helpers.crew import Crew
from tests.helpers.tiny import ROOT

TINY = [
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn_size=16",
    "model.rope.skip_layers=[1]",
    "training.iterations=2",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    "training.eval_samples=4",
    "optimizer.warmup_iterations=1",
]
LOG_EACH = "logging.interval=1"
PNG = b"\x89PNG"


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with few documents, and runs in forked processes."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/probe"))
    module = load("examples/probe/probe.py")
    monkeypatch.setattr(language, "AT_ONCE", 16)
    monkeypatch.setattr(module, "DATA", {"train": (40, 1), "validation": (17, 2)})
    run_in_crew(module, monkeypatch, at=2)
    return module


def run_in_crew(module: ModuleType, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The script's runs become forked processes. Logs of the ranks go into the run's folder, word `at` of its command, instead
    of that of the configuration, in the repository."""
    start = Crew._start

    def started(self, folder: Path, world: int, job, words: list[str], *rest) -> None:
        start(self, Path(words[at].partition("=")[2]), world, job, words, *rest)

    def train(words: Sequence[str]) -> None:
        Path(words[at].partition("=")[2]).mkdir(parents=True, exist_ok=True)
        crew = Crew(Path(words[0]), *words[1:])
        assert crew.wait() == [0], crew.output()

    monkeypatch.setattr(Crew, "_start", started)
    monkeypatch.setattr(module, "train", train)


def write_parts(folder: Path) -> None:
    """Datasets of a few tokens, for training and validation."""
    folder.mkdir(exist_ok=True)
    for part in ("train", "validation"):
        with IndexedWriter(folder / part, "<i4") as writer:
            writer.add(np.arange(200) % 250, [200], [1])
            writer.finish()


def test_from_generation_to_figures(
    probe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path), "--models", "dense_2", "mod", "--seeds", "1", *TINY]
    assert probe.main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["dense_2", "mod"]
    for row, name in zip(rows, ["dense_2", "mod"]):
        of_run = evaluate(next((tmp_path / name).iterdir()), tmp_path / "data/validation", modes=["causal"])
        assert row["loss"] == pytest.approx(of_run["causal"], abs=1e-5)
        assert row["tokens"] == of_run["tokens"] == sum(group["tokens"] for group in row["groups"])
        weighed = sum(group["loss"] * group["tokens"] for group in row["groups"]) / row["tokens"]
        assert weighed == pytest.approx(row["loss"], abs=1e-5)
    assert rows[0]["layers"] == {} and rows[1]["layers"]["1"]["share"] == pytest.approx(
        of_run["routed_fraction"], abs=1e-6
    )
    assert 0 < rows[1]["layers"]["1"]["area"] < 1
    taken = rows[1]["sample"]["1"]  # of the first document, one of those that the row is about
    assert rows[0]["sample"] == {} and len(taken) == probe.LANGUAGE.length and set(taken) == {"0", "1"}
    for figure in ("depth.png", "lists.png", "samples.png"):
        assert (tmp_path / figure).read_bytes().startswith(PNG)
    table = (tmp_path / "table.md").read_text()
    assert "dense_2" in table and "chase 2" in table and table in capsys.readouterr().out

    data, before = tmp_path / "data/train.bin", (tmp_path / "results.jsonl").read_bytes()
    changed = data.stat().st_mtime_ns
    assert probe.main(words) == 0  # nothing is left to do
    assert (tmp_path / "results.jsonl").read_bytes() == before and data.stat().st_mtime_ns == changed

    assert probe.main([*words, "--again", "--most", "1"]) == 0  # the same loss
    assert (tmp_path / "results.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"dense_2, seed 1: loss \d\.\d+, but its row says 9\.00000"):
        probe.check_again("dense_2, seed 1", rows[0]["loss"], 9.0)


def test_each_capacity_has_tables_of_its_own(probe: ModuleType) -> None:
    rows = probe.read_rows(ROOT / "examples/probe/results.jsonl", probe.ROW)
    usual = [row for row in rows if row["model"] in ("dense_8", "mod") and not row["overrides"]]
    other = [row | {"overrides": ["model.routing.capacity=0.125"]} for row in usual if row["model"] == "mod"]
    before, after = probe.tables(usual), probe.tables([*usual, *other])
    assert after[: len(before)] == before
    accuracies, choices = after[len(before) :]
    assert (
        "| dense_8 |" in accuracies and "| mod capacity=0.125 |" in accuracies and "| mod |" not in accuracies
    )
    assert "| mod capacity=0.125 | 1 |" in choices and "dense_8" not in choices


def test_every_model_is_in_one_of_the_figures_of_lists(
    probe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import probe_tables

    drawn: dict[str, list[str]] = {}
    monkeypatch.setattr(
        probe_tables,
        "draw_lists",
        lambda rows, path: drawn.update({path.stem: list(probe_tables.by_model(rows))}),
    )

    def draw(*models: str) -> dict[str, list[str]]:
        drawn.clear()
        rows = [{"model": name.split()[0], "overrides": name.split()[1:]} for name in models]
        probe_tables.draw_all_lists(rows, Path())
        return drawn

    assert draw("dense_8", "mod", "stt", "mod x=1") == {
        "lists": ["dense_8", "mod"],
        "kinds": ["dense_8", "stt", "mod x=1"],
    }
    quarter = "mod model.routing.capacity=0.25"
    assert draw("dense_8", "mod", quarter) == {
        "lists": ["dense_8", "mod"],
        "capacity_0.25": ["dense_8", quarter],
    }
    assert draw("dense_8 x=1", "mod x=1") == {"lists": ["dense_8 x=1", "mod x=1"]}
    assert draw("stt") == {"kinds": ["stt"]}


def test_operations_count_what_a_layer_runs_of_both_halves(probe: ModuleType, tmp_path: Path) -> None:
    """subskip reports the tokens that attend; its layers may run fewer or more tokens' feed-forward."""
    assert (
        probe.main(["--output", str(tmp_path), "--models", "subskip", "--seeds", "1", *TINY, LOG_EACH]) == 0
    )
    row = json.loads((tmp_path / "results.jsonl").read_text())
    folder = next((tmp_path / "subskip").iterdir())
    steps, _ = probe.records_of(folder)
    last = steps[-1]["routing"]["1"]  # of two steps, the second half
    assert row["fractions"]["1"]["mlp_fraction"] == last["mlp_fraction"]
    model = load_config(folder / "config.yaml").model
    length = probe.LANGUAGE.length
    assert row["flops_per_token"] == pytest.approx(
        training_flops(model, length, {1: last["routed_fraction"]}) / length
    )
    assert last["routed_fraction"] != pytest.approx(row["layers"]["1"]["share"], abs=1e-3)


def test_a_model_is_told_which_tokens_need_depth(probe: ModuleType, tmp_path: Path) -> None:
    from oracle import merit

    hops = np.array([[0, 0, 1, 2, 0, 0, 0, 3, 0]], np.uint8)
    best_first = np.argsort(-merit(hops)[0], kind="stable").tolist()
    assert best_first == [
        1,
        2,
        6,
        0,
        5,
        3,
        4,
        7,
    ]  # predict 1, 2 and 3 steps; stand before these; the rest in order

    words = ["--output", str(tmp_path), "--seeds", "1", "--models", "oracle"]
    assert probe.main([*words[:2], *TINY, *words[2:]]) == 0
    folder = next((tmp_path / "oracle").iterdir())
    config = load_config(folder / "config.yaml")
    dataset = IndexedDataset(tmp_path / "data/train")
    hops = read_labels(dataset).hops
    of_run = open_data(config).train
    told = Recording(folder / "told")
    for step in (1, 2):
        chosen, _, _, first = told.read(1, step)
        assert first == 4 * (step - 1) and chosen.sum(axis=1).tolist() == [48] * 4
        for row, sample in enumerate(of_run.take(range(first, first + 4))):
            places = of_run.places(first + row)
            assert np.array_equal(dataset.tokens[places], sample)
            needs = hops[places[1:]] > 0
            assert (chosen[row] & needs).sum() == min(48, needs.sum())


def test_a_model_starts_from_the_weights_of_the_oracle(probe: ModuleType, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path), *TINY, "--seeds", "1", "--models"]
    assert probe.main([*words, "mod_from_oracle"]) == 0  # trains the oracle first
    (oracle,) = tmp_path.glob("oracle/*/metrics.jsonl")
    changed = oracle.stat().st_mtime_ns
    assert probe.main([*words, "oracle"]) == 0
    rows = [json.loads(line)["model"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows == ["mod_from_oracle", "oracle"] and oracle.stat().st_mtime_ns == changed
    validations = [
        [json.loads(line)["validation"] for line in path.read_text().splitlines() if "validation" in line]
        for path in sorted(tmp_path.glob("*/*/metrics.jsonl"))
    ]
    assert validations[0][0] == pytest.approx(validations[1][-1], abs=1e-5)  # mod_from_oracle, oracle


def test_every_model_has_its_configuration(probe: ModuleType) -> None:
    for model in probe.MODELS:
        path, *words = probe.command(model, 1, Path("runs/probe"), [])
        assert load_config(path, words).training.sequence_length == probe.LANGUAGE.length
    assert {path.stem for path in Path(path).parent.glob("*.yaml")} == {"config", *probe.MODELS}


def test_the_page_has_the_table_of_the_committed_rows(probe: ModuleType) -> None:
    rows = probe.read_rows(ROOT / "examples/probe/results.jsonl", probe.ROW)
    page = (ROOT / "docs/probe.md").read_text()
    for table in probe.tables(rows):
        assert table in page, "the page is to say:\n" + table


def test_bad_input_is_refused_before_anything_runs(probe: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--models dense_9: no configuration of the probe"):
        probe.main(["--output", str(tmp_path), "--models", "dense_9"])
    (tmp_path / "results.jsonl").write_text('{"model": "dense_2"}\n')
    with pytest.raises(UserError, match=r"results\.jsonl: line 1 is not a row of results"):
        probe.main(["--output", str(tmp_path), "--most", "0"])
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(ConfigError, match="training.sequence_length = 7"):
        probe.main(
            ["--output", str(tmp_path), "--models", "dense_2", "--most", "1", "training.sequence_length=7"]
        )
    probe.DATA["train"] = (41, 1)
    with pytest.raises(UserError, match="was generated otherwise; remove"):
        probe.main(["--output", str(tmp_path), "--most", "0"])
    assert not (tmp_path / "results.jsonl").exists()
