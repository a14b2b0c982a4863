"""Checkpoints of a run are evaluated on tasks of lm_eval while it trains (`training.tasks`)."""

import csv
import json
import math
import os
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from megadyn.checkpoint import layout
from megadyn.checkpoint.export import export
from megadyn.commands import check
from megadyn.errors import UserError
from megadyn.report.report import write_report
from megadyn.training import task_process
from tests.helpers.crew import Crew, last_step, lines
from tests.helpers.tiny import ROOT

EXAMPLE = ROOT / "examples/eval"


AT_ONCE = f"""
import os, runpy
os.nice = lambda by: None
runpy.run_module({task_process.MODULE!r}, run_name="__main__")
"""


def evaluates_at_once(rank: int, *, cache: Path) -> None:
    """Does not yield to other tests; has a cache of its own."""
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    command = task_process.command
    task_process.command = lambda **asked: [sys.executable, "-c", AT_ONCE, command(**asked)[-1]]


# lm_eval's own
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_the_scores_are_those_of_lm_eval_on_the_exported_checkpoint(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [(ROOT / "megadyn" / name).read_text()[:800] for name in ("errors.py", "hub.py", "checks.py")]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    runpy.run_path(str(EXAMPLE / "make_tasks.py"))["main"](tmp_path / "held.jsonl", tmp_path / "eval")
    (tmp_path / "tasks").mkdir()
    for name in ("heldout_text", "next_line"):
        text = (EXAMPLE / f"tasks/{name}.yaml").read_text()
        (tmp_path / f"tasks/{name}.yaml").write_text(text.replace("runs/eval", str(tmp_path / "eval")))
    settings = [f"training.tasks={{names: [{tmp_path}/tasks], threads: 1, limit: 2, batch_size: 4}}"]
    settings += [
        "training.iterations=2",
        "model.max_position=160",
        "logging.csv=true",
        "checkpoint.interval=1",
    ]
    sabotage = partial(evaluates_at_once, cache=tmp_path / "cache")
    crew = Crew(config_file, *settings, sabotage=sabotage)
    assert crew.wait(240) == [0], crew.output()
    out = tmp_path / "out"
    (record,) = [line for line in lines(out) if "tasks" in line]
    assert record["iteration"] == 2, "with an interval of 0 the run's last checkpoint alone"

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export(out / "checkpoints" / layout.folder_name(2), tmp_path / "hf")
    by_hand = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path}/hf,trust_remote_code=True,routing_mode=causal",
        tasks=["heldout_text", "next_line"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=1,
        limit=2,
    )["results"]
    found = {f"{task},{name}": value for task, one in record["tasks"].items() for name, value in one.items()}
    wanted = {
        f"{task},{name.removesuffix(',none')}": value
        for task, one in by_hand.items()
        for name, value in one.items()
        if name.endswith(",none") and isinstance(value, float) and math.isfinite(value)
    }
    assert {"heldout_text,bits_per_byte", "next_line,acc", "next_line,acc_stderr"} <= wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-5)

    bits = record["tasks"]["heldout_text"]["bits_per_byte"]
    assert f"bits_per_byte {bits:.4f}" in crew.output()
    with (out / "metrics.csv").open() as file:
        rows = {row["name"]: (row["iteration"], float(row["value"])) for row in csv.DictReader(file)}
    assert rows["tasks/heldout_text/bits_per_byte"] == ("2", bits)
    whole = json.loads((out / "tasks/iteration-00000002.json").read_text())
    assert whole["lm_eval"]["n-samples"]["next_line"]["effective"] == 2
    assert sorted(path.name for path in (out / "tasks").iterdir()) == [
        "iteration-00000002.json",
        "iteration-00000002.log",
    ]
    write_report([out], tmp_path / "report.html", tokens=0)
    page = (tmp_path / "report.html").read_text()
    assert "Tasks: bits_per_byte" in page and f"{bits:.4g}</td>" in page


STAND_IN = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
name = os.path.basename(asked["checkpoint"])
print("begin", name, flush=True)
while not os.path.exists(GATE):
    if os.getppid() != asked["parent"]: sys.exit(3)
    time.sleep(0.02)
if open(GATE).read() == name:
    sys.exit("error: no such data")
result = {"checkpoint": asked["digest"], "seconds": 1.0, "tasks": {"t": {"acc": int(name[-8:]) / 10}}}
open(asked["output"] + ".new", "w").write(json.dumps(result))
os.rename(asked["output"] + ".new", asked["output"])
"""


def stands_in(rank: int, *, gate: Path) -> None:
    """The evaluation waits for the file `gate`, and fails for the checkpoint that it names."""

    def command(**asked: Any) -> list[str]:
        script = STAND_IN.replace("GATE", repr(str(gate)))
        return [sys.executable, "-S", "-c", script, json.dumps({"parent": os.getpid(), **asked})]

    task_process.command = command
    task_process.refuse_unknown = lambda settings: None


def test_training_does_not_wait_and_each_checkpoint_is_evaluated_once(
    config_file: Path, tmp_path: Path
) -> None:
    settings = ["training.iterations=4", "data.validation_fraction=0", "training.eval_interval=0"]
    settings += ["checkpoint.interval=1", "checkpoint.keep=1", "training.tasks={names: [t], interval: 1}"]
    gate, out = tmp_path / "gate", tmp_path / "out"

    def kept() -> list[int]:
        return sorted(layout.iteration_of(path) for path in (out / "checkpoints").glob("iteration-*"))

    def scored() -> list[tuple[int, float]]:
        return [(line["iteration"], line["tasks"]["t"]["acc"]) for line in lines(out) if "tasks" in line]

    def run(*more: str, world: int = 1) -> str:
        sabotage = partial(stands_in, gate=gate)
        crew = Crew(config_file, *settings, *more, world=world, sabotage=sabotage)
        assert crew.wait() == [0] * world, crew.output()
        assert "evaluating" not in crew.output(world - 1) or world == 1
        return " ".join(crew.output().split())

    # Steps go on while the first is evaluated. The newest waits, and the end of the run waits for both, but not for long.
    said = run("training.tasks.wait_s=0.3")
    assert last_step(out) == 4 and scored() == [] and kept() == [1, 4], "held, although one is kept"
    assert [line["iteration"] for line in lines(out) if "tasks_left_out" in line] == [2, 3]
    left = f"{out}/checkpoints/iteration-00000001, {out}/checkpoints/iteration-00000004; the same command"
    assert re.search(rf"not evaluated on tasks within \d+ s: {left}", said), said
    assert "interrupted" not in said

    # The same command takes them up, of a complete run too. One succeeds, and the other fails.
    gate.write_text("iteration-00000004")
    said = run()
    assert scored() == [(1, 0.1)] and kept() == [4]
    assert "iteration-00000004 was not evaluated on tasks: error: no such data (exit" in said
    assert [line["iteration"] for line in lines(out) if "tasks_failed" in line] == [4]
    assert not list(out.rglob(layout.EVALUATED))

    # A longer run begins with what failed, and evaluates its own last one.
    gate.write_text("")
    run("training.iterations=5", world=2)
    assert scored() == [(1, 0.1), (4, 0.4), (5, 0.5)] and kept() == [5]


def test_a_task_that_is_not_there_ends_the_start(config_file: Path, tmp_path: Path) -> None:
    given = f"training.tasks.names=[{tmp_path}/none.yaml]"
    sentence = f"training.tasks.names: {tmp_path}/none.yaml: no such file or folder"
    crew = Crew(config_file, given, world=2)
    assert crew.wait() == [2, 2], crew.output()
    assert [crew.errors(rank)[0].partition("] ")[2] or crew.errors(rank)[0] for rank in range(2)] == [
        f"error: {sentence}",
        sentence,
    ]
    assert not (tmp_path / "out/checkpoints").exists() and not (tmp_path / "out/tasks").exists()
    with pytest.raises(UserError, match=f"^{sentence}$"):
        check.main([str(config_file), given])
