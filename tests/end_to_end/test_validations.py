"""Several validation sets by name in a run, and the checkpoint that is best by one of them."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from megadyn.checkpoint import layout
from megadyn.evaluation.losses import evaluate
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.report.report import write_report
from tests.helpers.crew import Crew, lines
from tests.helpers.tiny import ROOT


def test_each_named_set_is_reported_and_the_best_checkpoint_is_kept(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model that learns one alphabet unlearns the other: every later checkpoint is worse.
    for name, text in (("train", "ab ba abba " * 300), ("prose", "XYZ_ZYX_YY_" * 300)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        preprocess(Corpus([tmp_path / f"{name}.jsonl"]), "byte", tmp_path / name, append_eod=True)
    train = next(line for line in config_file.read_text().splitlines() if line.startswith("data:"))
    dataset = train.split("train: ")[1].split(",")[0]
    named = f"data.validation={{prose: {tmp_path}/prose, both: [{dataset}, {tmp_path}/prose]}}"
    settings = [
        named,
        f"data.train={tmp_path}/train",
        "data.validation_fraction=null",
        "training.eval_interval=1",
        "training.eval_samples=4",
        "checkpoint.interval=1",
        "checkpoint.keep=1",
        "checkpoint.keep_best=prose",
        "checkpoint.background=true",
        "logging.csv=true",
        "optimizer.warmup_iterations=0",
        "optimizer.learning_rate=0.1",
        "optimizer.min_learning_rate=0.1",
        "training.iterations=4",
    ]
    crew = Crew(config_file, *settings, world=2)
    assert crew.wait() == [0, 0], crew.output()
    out = tmp_path / "out"
    found = {line["iteration"]: line["validation/prose"] for line in lines(out) if "validation/prose" in line}
    assert list(found) == [0, 1, 2, 3, 4]
    assert sum("validation/both" in line for line in lines(out)) == 5
    assert not any("validation" in line for line in lines(out))
    for losses in found.values():
        size = json.loads((tmp_path / "prose.json").read_text())
        per_byte = size["tokens"] / size["text_bytes"] / math.log(2)
        assert losses["bits_per_byte"]["causal"] == pytest.approx(losses["causal"] * per_byte)
    with (out / "metrics.csv").open() as file:
        names = {row["name"] for row in csv.DictReader(file)}
    assert {"validation/prose/causal", "validation/both/topk", "validation/both/bits_per_byte/topk"} <= names

    best = min((1, 2, 3, 4), key=lambda iteration: found[iteration]["causal"])
    assert best < 4, found
    assert sorted(map(layout.iteration_of, (out / "checkpoints").glob("iteration-*"))) == [best, 4]
    folder = out / "checkpoints" / layout.folder_name(best)
    assert layout.best_of(folder) == ("prose", found[best]["causal"])
    events = [line["best_checkpoint"] for line in lines(out) if "best_checkpoint" in line]
    assert events[-1] == {"iteration": best, "validation": "prose", "loss": found[best]["causal"]}
    scored = evaluate(folder, tmp_path / "prose", modes=("causal",), samples=4)["causal"]
    assert scored == pytest.approx(found[best]["causal"], abs=1e-4)

    write_report([out], tmp_path / "report.html", tokens=0)
    page = (tmp_path / "report.html").read_text()
    assert "Validation loss by set, causal (nats per token)" in page
    assert "validation/prose loss, causal" in page
    assert f"the best by its loss on prose: {found[best]['causal']:.4f}" in page

    (tmp_path / "evaluation.json").write_text('{"topk": 1.0, "causal": 1.0}\n')
    monkeypatch.setattr(sys, "argv", ["summarize.py", str(out), str(tmp_path / "evaluation.json")])
    runpy.run_path(str(ROOT / "examples/quickstart/summarize.py"), run_name="__main__")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["validations"]["prose"] == found[4]
