"""What the tools say about a run in phases before it begins, and the report after it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megadyn.commands import check, plan
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.errors import UserError

PHASES = [
    {"name": "hold", "iterations": 6},
    {"name": "decay", "iterations": 2, "optimizer": {"schedule": "linear", "min_learning_rate": 1e-4}},
    {"name": "long", "iterations": 2, "training": {"sequence_length": 96, "global_batch_size": 2}},
]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    content = {
        "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "vocab_size": 300},
        "data": {"train": str(tmp_path / "corpus"), "split": [1, 0, 0], "cache": str(tmp_path / "cache")},
        "tokenizer": {"path": "byte"},
        "training": {"global_batch_size": 4, "sequence_length": 48},
        "optimizer": {"schedule": "constant", "learning_rate": 1e-3, "warmup_iterations": 2},
        "precision": "fp32",
        "output_dir": str(tmp_path / "out"),
        "phases": PHASES,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_plan_lists_phases_and_layouts_that_all_of_them_can_have(config_file, capsys):
    words = [str(config_file), "--gpus", "4", "--gpu-memory", "80", "--json"]
    assert plan.main(words) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith(("hold ", "decay ", "long "))]
    assert [row[:6] for row in rows] == [
        ["hold", "1-6", "1,152", "4", "x", "48"],
        ["decay", "7-8", "384", "4", "x", "48"],
        ["long", "9-10", "384", "2", "x", "96"],
    ]
    assert [row[6:9] for row in rows] == [
        ["0.0005", "->", "0.001"],
        ["0.00055", "->", "0.0001"],
        ["0.001", "->", "0.001"],
    ]
    assert float(rows[0][9]) == pytest.approx(3 * float(rows[1][9]), rel=0.01)
    assert "the layouts are those of long, whose samples take most memory" in said
    assert "steps of 2 x 96 tokens" in said
    layouts: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
    assert {layout["data"] for layout in layouts if "data" in layout} == {
        1,
        2,
    }  # not 4, which 2 samples exclude


def test_the_plan_of_an_annealed_capacity_adds_up_its_levels_and_is_that_of_the_highest(config_file, capsys):
    words = [str(config_file), "--gpus", "1", "--gpu-memory", "80", "phases=[]", "training.iterations=10"]
    words += ["model.routing.kind=mod", "model.routing.capacity=0.25"]
    flops = {}
    for capacity in (1.0, 0.25):
        plan.main([*words, f"model.routing.capacity={capacity}", "phases=[{name: x, share: 1}]"])
        flops[capacity] = float(capsys.readouterr().out.split("\nall ")[1].splitlines()[0].split()[-1])
    anneal = ["training.anneal.capacity=1", "training.anneal.iterations=4", "training.anneal.levels=1"]
    assert plan.main([*words, *anneal]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith(("run", "all "))]
    assert [row[:2] for row in rows] == [["run.1", "1-4"], ["run", "5-10"], ["all", "1-10"]]
    assert float(rows[2][-1]) == pytest.approx(0.4 * flops[1.0] + 0.6 * flops[0.25], rel=0.01)
    assert flops[0.25] < 0.95 * flops[1.0]
    assert "mod at capacity 1.0: " in said
    assert "the layouts are those of run.1, whose samples take most memory" in said


def test_ranks_are_built_for_the_largest_phase_if_all_of_them_can_run(config_file, capsys):
    words = [str(config_file), "--gpu-memory", "80", "--gpus"]
    assert plan.main([*words, "2", "--rank", "1"]) == 0
    assert "rank 1 of 2" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"^phase 'long': training\.global_batch_size = 2: must be a multiple of"
    ):
        plan.main([*words, "4", "--rank", "1"])


def test_a_check_covers_each_phase(config_file, capsys):
    assert check.main([str(config_file), "--processes", "2"]) == 0
    assert (
        "hold: 2 micro-batches of 1 each; decay: 2 micro-batches of 1 each; long: 1 micro"
        in capsys.readouterr().out
    )
    with pytest.raises(
        UserError, match=r"^phase 'long': training\.global_batch_size = 2: must be a multiple of"
    ):
        check.main([str(config_file), "--processes", "4"])


def test_a_check_leaves_the_gpus_of_tasks_to_the_run(config_file, monkeypatch):
    """It often runs on a login node, where they are not."""
    asked = []
    monkeypatch.setattr(check, "refuse_unknown", lambda settings, device: asked.append(device))
    tasks = ["training.tasks.names=[piqa]", "training.tasks.device=cuda:1"]
    assert check.main([str(config_file), "phases=[]", "training.iterations=3", *tasks]) == 0
    assert asked == ["cpu"]


def test_a_check_opens_the_data_of_each_phase(config_file):
    with IndexedWriter(config_file.parent / "corpus", "<u2") as writer:
        writer.add(np.full(90, 65), [90], [1])
        writer.finish()
    with pytest.raises(
        UserError, match=r"^phase 'long': dataset .*corpus: the 90 tokens of 1 documents are too few"
    ):
        check.main([str(config_file), "--data"])
    assert check.main([str(config_file), "--data", "phases=[]", "training.iterations=3"]) == 0
    assert not (config_file.parent / "out").exists()
