"""The grid of models at equal operations: the order of its runs, from datasets to tables, the fit, the corpus."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megadyn.errors import UserError
from megadyn.planning.flops import training_flops
from tests.docs.commands import load
from tests.examples.test_probe import run_in_crew, write_parts
from tests.helpers.tiny import ROOT

TINY = (
    "training.sequence_length=8",
    "training.global_batch_size=2",
    "training.micro_batch_size=2",
    "training.eval_samples=2",
)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with one size and few operations; runs are forked processes."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/study"))  # for `fit` in the tests
    module = load("examples/study/grid.py")
    monkeypatch.setattr(module, "SIZES", {"32x2": 32})
    monkeypatch.setattr(module, "SWEPT", "32x2")
    monkeypatch.setattr(module, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(module, "BUDGETS", (1e8, 2e8))
    monkeypatch.setattr(module, "VOCABULARY", 300)
    run_in_crew(module, monkeypatch, at=1)
    return module


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_the_page_has_the_tables_and_the_fit_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit's numbers closely: 600 minima are not the same bit for bit on every machine."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/study"))
    grid = load("examples/study/grid.py")
    rows = grid.in_grid_order(grid.read_rows(ROOT / "examples/study/grid.jsonl", grid.ROW))
    decoded = grid.read_rows(ROOT / "examples/study/grid.decode.jsonl", grid.DECODED_ROW)
    assert rows and decoded
    page = (ROOT / "docs/skipping.md").read_text()
    sweep, losses, law, speeds = grid.parts_of_report(rows, decoded)
    for part in (sweep, losses, speeds):
        assert part in page, "the page is to say:\n" + part
    start = page.index("L = ")
    said = page[start : page.index("\n\n", page.index("| 90 % interval |", start)) + 1]
    assert NUMBER.sub("#", said) == NUMBER.sub("#", law), "the page is to say:\n" + law
    numbers = [np.array(NUMBER.findall(text), float) for text in (said, law)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.03), "the page is to say:\n" + law


def row_of(cell: tuple, loss: float, grid: ModuleType) -> dict:
    """What the order of runs needs, and numbers that tables need."""
    known = {"text": "0", "loss": loss, "parameters": [1, 0], "tokens": 1, "steps": 1, "seconds": 1.0}
    return grid.Cell(*cell)._asdict() | {"overrides": []} | known


def test_a_budget_begins_with_its_sweep_and_every_prefix_of_its_grid_has_whole_seeds(
    grid: ModuleType,
) -> None:
    def ahead() -> list[tuple]:
        return [(cell.budget, cell.seed, cell.kind, cell.rate) for cell in grid.next_cells(rows, ())]

    rows: list[dict] = []
    sweep = [(1e8, 0, kind, rate) for rate in (1e-3, 2e-3) for kind in ("dense", "mod")]
    assert ahead() == sweep
    for (budget, seed, kind, rate), loss in zip(sweep, [5.0, 5.2, 5.1, 4.9]):  # means: 5.1 and 5.0
        rows.append(row_of((budget, seed, "32x2", kind, rate), loss, grid))
    wanted = [(1e8, seed, kind, 2e-3) for seed in (1, 2, 3) for kind in grid.KINDS]
    assert ahead() == wanted
    rows += [row_of((budget, seed, "32x2", kind, rate), 4.0, grid) for budget, seed, kind, rate in wanted[1:]]
    assert ahead() == wanted[:1]
    rows.append(row_of((1e8, 1, "32x2", "dense", 2e-3), 4.0, grid))
    assert ahead() == [(2e8, *cell[1:]) for cell in sweep]


def test_from_datasets_to_a_row_and_its_table(
    grid: ModuleType, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/train.jsonl").touch()
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    write_parts(tmp_path / "data")
    words = ["--output", str(tmp_path), *TINY]
    assert grid.main([*words, "--most", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["seed"], row["rate"]) for row in rows] == [("dense", 0, 1e-3), ("mod", 0, 1e-3)]
    for row, skipped in zip(rows, (0, 1)):
        config = grid.settled(grid.command(grid.cell_of(row), tmp_path)[1:])
        step = 2 * training_flops(config.model, 8)
        assert row["steps"] == 1e8 // step and row["tokens"] == 16 * row["steps"]
        assert row["flops"] == pytest.approx(step * row["steps"]) and 1e8 - step < row["flops"] <= 1e8
        assert 2 < row["loss"] < 7 and row["seconds"] > 0
        assert (row["parameters"][1] > 0) == bool(skipped)
    assert rows[1]["steps"] > rows[0]["steps"]  # what is skipped is trained longer
    printed = capsys.readouterr().out
    assert (
        f"| operations | kind | rate 0.001 |\n| --- | --- | --- |\n| 1e+08 | dense | {rows[0]['loss']:.4f} |"
        in printed
    )
    assert "No fit yet" in printed

    before = (tmp_path / "results.jsonl").read_bytes()
    for _ in range(2):
        assert grid.main([*words, "--again", "2"]) == 0
        assert "mod 32x2, 1e+08 operations, rate 0.001, seed 0: the same loss" in capsys.readouterr().out
    assert grid.main(["--output", str(tmp_path), "--fit"]) == 0
    assert capsys.readouterr().out == ""  # overrides are part of a row
    assert grid.main([*words, "--fit"]) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="--again 3: .* has 2 rows"):
        grid.main([*words, "--again", "3"])


def test_a_rate_at_which_a_run_diverges_is_not_the_best(
    grid: ModuleType,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/train.jsonl").touch()
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    write_parts(tmp_path / "data")
    words = [*TINY, "optimizer.name=adamw"]
    in_crew = grid.train

    def train(words: Sequence[str]) -> None:
        try:
            in_crew(words)
        except AssertionError as error:
            raise UserError(str(error)) from None

    monkeypatch.setattr(grid, "train", train)

    def run(seed: int, rate: float) -> dict:
        return grid.run(grid.Cell(1e8, seed, "32x2", "dense", rate, tuple(words)), tmp_path)

    row = run(grid.SWEEP_SEED, 1e30)
    assert all(row[name] is None for name in grid.MEASURED)
    with pytest.raises(UserError, match="is bad: "):
        run(1, 1e30)
    assert run(grid.SWEEP_SEED, 1e30) == row  # again

    monkeypatch.setattr(grid, "RATES", (1e30,))
    assert grid.main(["--output", str(tmp_path), *words, "--most", "1"]) == 0
    assert "dense 32x2, 1e+08 operations, rate 1e+30, seed 0: diverged" in capsys.readouterr().out
    monkeypatch.setattr(grid, "RATES", (1e-3, 2e-3))

    def swept(*losses: float | None) -> list[dict]:
        cells = [
            (1e8, grid.SWEEP_SEED, "32x2", kind, rate) for rate in grid.RATES for kind in ("dense", "mod")
        ]
        return [row_of(cell, loss, grid) for cell, loss in zip(cells, losses)]

    rows = swept(5.0, 5.2, 4.0, None)
    assert {cell.rate for cell in grid.next_cells(rows, ())} == {1e-3}
    assert "| 1e+08 | mod | 5.2000 | diverged |" in grid.parts_of_report(rows, [])[0]
    with pytest.raises(
        UserError, match=r"1e\+08 operations: at every rate of the sweep a run diverged; RATES"
    ):
        grid.next_cells(swept(5.0, None, 4.0, None), ())
    grid.check_again("it", None, None)
    with pytest.raises(UserError, match="it: loss none, it diverged, but its row says 4.0"):
        grid.check_again("it", None, 4.0)


def test_the_best_of_each_kind_are_decoded(
    grid: ModuleType,
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dense and a routed model of one size, and a budget that is not whole."""
    monkeypatch.setattr(grid, "make_data", lambda output: None)
    monkeypatch.setattr(grid, "DECODED", ("--batch", "1", "--context", "4", "--steps", "2", "--rounds", "1"))
    monkeypatch.setattr(grid, "KINDS", {name: grid.KINDS[name] for name in ("dense", "random")})
    monkeypatch.setattr(grid, "SWEPT_KINDS", ("dense", "random"))
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    write_parts(tmp_path / "data")
    words = ["--output", str(tmp_path), *TINY]
    overrides = {"overrides": list(TINY)}
    for cell in ((1e8, 0, "32x2", kind, rate) for kind in grid.KINDS for rate in grid.RATES):
        grid.add_row(tmp_path / "results.jsonl", row_of(cell, 5.0, grid) | overrides)
    with pytest.raises(UserError, match="--decode: needs rows of every size and kind"):
        grid.main([*words, "--decode"])
    with pytest.raises(UserError, match="the text here is .*, but rows are of 0: losses cannot be compared"):
        grid.main([*words, "--most", "2"])
    with pytest.raises(UserError, match="the text here is"):
        grid.main([*words, "--again", "1"])
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text().replace('"text": "0"', f'"text": "{grid.text_here(tmp_path)}"'))
    assert grid.main([*words, "--most", "2", "--jobs", "2"]) == 0
    larger = row_of((2e8, 1, "32x2", "dense", 1e-3), 1.0, grid)
    grid.add_row(tmp_path / "results.jsonl", larger | overrides)
    capsys.readouterr()
    assert grid.main([*words, "--decode"]) == 0
    dense, random = (
        json.loads(line) for line in (tmp_path / "results.decode.jsonl").read_text().splitlines()
    )
    assert (dense["kind"], random["kind"]) == ("dense", "random") and {dense["budget"], random["budget"]} == {
        1e8
    }
    of_layer = 2 * 32 * 4  # keys and values of one head, in fp32
    assert dense["kv_bytes"] == 2 * of_layer and random["kv_bytes"] < dense["kv_bytes"]
    assert dense["tokens_per_second"] > 0
    printed = capsys.readouterr().out
    assert f"| dense | 32x2 | 1e+08 | {dense['tokens_per_second']:.0f} | 512 |" in printed
    assert not (tmp_path / "results.png").exists()
    assert grid.main([*words, "--fit"]) == 0
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert f"{dense['tokens_per_second']:.0f} | 512 |" in capsys.readouterr().out
    assert grid.main(["--output", str(tmp_path), "--fit"]) == 0
    assert capsys.readouterr().out == ""  # rows without overrides there are none
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--decode: .*iteration-0.* is not there; train dense 32x2"):
        grid.main([*words, "--decode"])


def test_after_a_failed_run_the_others_are_finished_and_have_their_rows(
    grid: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cell: tuple, output: Path) -> dict:
        if cell.kind == "dense":
            raise UserError("the loss is not finite")
        time.sleep(0.2)
        return row_of(cell[:5], 5.0, grid)

    monkeypatch.setattr(grid, "make_data", lambda output: None)
    monkeypatch.setattr(grid, "run", run)
    with pytest.raises(UserError, match="the loss is not finite"):
        grid.main(["--output", str(tmp_path), "--jobs", "2"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["rate"]) for row in rows] == [("mod", 1e-3)]


def test_rows_of_another_grid_are_refused(
    grid: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "make_data", lambda output: None)
    grid.add_row(tmp_path / "results.jsonl", row_of((1e8, 1, "96x6", "dense", 1e-3), 5.0, grid))
    for words in (["--fit"], ["--again", "1"]):
        with pytest.raises(UserError, match="a row has size '96x6', but the grid has 32x2; remove it"):
            grid.main(["--output", str(tmp_path), *words])


def test_the_best_size_counts_only_seeds_that_have_all(grid: ModuleType) -> None:
    from grid_tables import at_optimum

    def rows(seed: int, budget: float, losses: dict[str, float]) -> list[dict]:
        return [row_of((budget, seed, size, "dense", 1e-3), of, grid) for size, of in losses.items()]

    whole = rows(1, 1e8, {"a": 5.0, "b": 4.0}) + rows(2, 1e8, {"a": 3.0, "b": 4.5})
    part = rows(3, 1e8, {"b": 1.0}) + rows(1, 2e8, {"b": 1.0})
    found = at_optimum([*whole, *part], ("a", "b"), ("dense",))
    assert [(row["budget"], row["size"], row["seed"]) for row in found] == [(1e8, "a", 1)]
    assert at_optimum(part, ("a", "b"), ("dense",)) == []


def made_up(worth: dict[str, float], noise: float) -> list[dict]:
    """Rows of a law that is known."""
    random, rows = np.random.default_rng(1), []
    for budget in (1e13, 3e13):
        for width, layers in ((64, 4), (96, 6), (128, 8), (160, 10)):
            for kind, of in worth.items():
                for seed in (1, 2, 3):
                    whole = 13 * layers * width**2
                    parts = [whole, 0] if kind == "dense" else [whole / 2, whole / 2]
                    tokens = budget / 6 / (parts[0] + 0.25 * parts[1] + 8192 * width)
                    loss = 1.5 + 55 * (parts[0] + of * parts[1]) ** -0.35 + 245 * tokens**-0.4
                    rows.append(
                        {"budget": budget, "size": f"{width}x{layers}", "kind": kind, "seed": seed, "parameters": parts,
                         "tokens": tokens, "loss": loss * np.exp(noise * random.normal()), "rate": 2e-3, "seconds": 1.0}
                    )  # fmt: skip
    return rows


def test_the_fit_finds_what_skipped_layers_are_worth(
    grid: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fit

    monkeypatch.setattr(fit, "SAMPLES", 40)
    worth = {"dense": 1.0, "mod": 0.4, "random": 0.1}
    assert fit.fit(made_up(worth, 0.0), ["mod", "random"])[5:] == pytest.approx([0.4, 0.1], abs=0.01)
    said = fit.say_fit(made_up(worth, 3e-3), "dense").splitlines()
    for line, of in zip(said[4:6], (0.4, 0.1)):
        found, interval = line.split("|")[2:4]
        low, high = map(float, interval.split("to"))
        assert low <= float(found) <= high and low - 0.03 < of < high + 0.03 and high - low < 0.2
    one_seed = [row for row in made_up(worth, 3e-3) if row["seed"] == 1]
    assert fit.say_fit(one_seed, "dense").count("| needs more seeds |") == 2
    few = [row for row in made_up(worth, 0.0) if row["budget"] == 1e13]
    assert "There are 4 dense cells, of 1 budgets." in fit.say_fit(few, "dense")


def test_the_fit_says_when_sizes_hardly_matter(grid: ModuleType) -> None:
    """Only the smallest size is worse: that is a cliff, not a power of N."""
    import fit

    rows = [row for row in made_up({"dense": 1.0, "mod": 0.4}, 0.0) if row["seed"] == 1]
    law = fit.say_fit(rows, "dense").splitlines()[0]
    assert "bound" not in law and "Losses differ from it by 0.0" in law
    for row in rows:
        row["loss"] = 1.5 + 245 * row["tokens"] ** -0.4 + (0.3 if row["size"] == "64x4" else 0.0)
    assert "The fit itself ends at a bound" in fit.say_fit(rows, "dense")


def test_samples_deviate_as_seeds_do(grid: ModuleType) -> None:
    """Two cells of one budget whose seeds deviate alike and a little by themselves, and a cell with one seed."""
    import fit

    means = {"a": 1.0, "b": 2.0, "c": 3.0}
    rows = [
        {
            "budget": 1,
            "size": "x",
            "kind": kind,
            "seed": seed,
            "loss": np.exp(means[kind] + sign * (0.1 + own)),
        }
        for seed, sign in ((1, -1), (2, 1))
        for kind, own in (("a", 0.01), ("b", -0.01))
    ]
    rows.append({"budget": 2, "size": "x", "kind": "c", "seed": 1, "loss": np.exp(3.0)})
    shared, own = fit.deviations_of(rows)
    assert sorted(shared) == pytest.approx([-0.1 * 2**0.5, 0.1 * 2**0.5])
    assert sorted(own) == pytest.approx([-0.01 * 2**0.5] * 2 + [0.01 * 2**0.5] * 2)
    samples = [fit.sampled(rows, np.random.default_rng(seed)) for seed in range(400)]
    a1, a2, b1, _, c1 = np.transpose([[np.log(row["loss"]) for row in sample] for sample in samples])
    for column, mean in ((a1, 1.0), (b1, 2.0), (c1, 3.0)):
        assert column.mean() == pytest.approx(mean, abs=0.03) and column.std() == pytest.approx(
            0.142, rel=0.02
        )
    assert np.corrcoef(a1, b1)[0, 1] > 0.95, "cells of one seed deviate together"
    assert abs(np.corrcoef(a1, a2)[0, 1]) < 0.2 and abs(np.corrcoef(a1, c1)[0, 1]) < 0.2


def test_the_best_size_is_where_a_parabola_is_lowest(grid: ModuleType) -> None:
    from grid_tables import say_optimum

    runs = [{"parameters": [np.exp(x), 0], "loss": 3 + (x - 2) ** 2} for x in (1, 2.5, 4)]
    assert say_optimum(runs) == f"{np.exp(2):.3g}, loss 3.0000"
    assert say_optimum(runs[:2]) == "-"
    falling = [run | {"loss": (np.log(run["parameters"][0]) - 9) ** 2} for run in runs]
    assert say_optimum(falling) == "at an end"


def test_the_corpus_holds_projects_out_and_takes_words_once(tmp_path: Path) -> None:
    corpus = load("examples/study/make_corpus.py")
    names = [f"project{number}" for number in range(40)]
    held = {name for name in names if corpus.is_held_out(f"root/{name}")}
    assert 0 < len(held) < 10
    for number, name in enumerate(names):
        (tmp_path / "root" / name / "tests").mkdir(parents=True)
        (tmp_path / f"root/{name}/a.py").write_text(f"word{number} " * 100)
        (tmp_path / f"root/{name}/b.md").write_text(
            "the same  in all\n" * 50 if number % 2 else "the same in all " * 50
        )
        (tmp_path / f"root/{name}/tests/c.py").write_text(f"left{number} " * 100)
        (tmp_path / f"root/{name}/License.txt").write_text(f"left{number} " * 100)
        (tmp_path / f"root/{name}/data.txt").write_bytes(b"\xff" * 500)
    documents = list(corpus.documents_of([tmp_path / "root"], 1))
    assert [project for project, _ in documents] == sorted(
        [*(f"root/{name}" for name in names), "root/project0"]
    )
    assert not any("left" in text for _, text in documents)
    with pytest.raises(UserError, match=r"0 MB of text below .*root: must be at least 1"):
        corpus.write(tmp_path / "out", [tmp_path / "root"], 1)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "root/project1/long.txt").write_text("".join(f"{n} " for n in range(50_000)))
    for name in names:
        (tmp_path / f"root/{name}/long.txt").write_text("".join(f"{name}{n} " for n in range(2500)))
    corpus.write(tmp_path / "out", [tmp_path / "root"], 1)
    projects = {
        part: {
            json.loads(line)["project"] for line in (tmp_path / f"out/{part}.jsonl").read_text().splitlines()
        }
        for part in ("train", "validation")
    }
    assert projects["validation"] == {f"root/{name}" for name in held}
    assert not projects["train"] & projects["validation"]
