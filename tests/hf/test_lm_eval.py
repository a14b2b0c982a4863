"""lm_eval's scores of an exported folder on real text, as examples/eval/run.sh asks for them, against the oracle's."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import numpy as np
import pytest
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

from megadyn.hf.tokenizer_files import write_tokenizer
from tests.helpers.oracle import oracle_logits
from tests.helpers.tiny import ROOT
from tests.hf.tiny_models import random_tokens, set_thresholds, tiny_model

# lm_eval's own
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("ResourceWarning", "UserWarning")]
EXAMPLE = ROOT / "examples" / "eval"
LENGTH, EOD = 160, 256
SOURCES = (
    "megadyn/config/data.py",
    "megadyn/prepare/readers.py",
    "megadyn/network.py",
    "megadyn/prepare/units.py",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two exported models, and with the local tasks on some of the project's own sources."""
    folder = tmp_path_factory.mktemp("lm_eval")
    for kind in ("dtf4", "mod"):
        model = tiny_model(kind, vocab_size=257, max_position_embeddings=LENGTH)
        set_thresholds(model, random_tokens(4, 100))
        model.save_pretrained(folder / kind)
        write_tokenizer("byte", folder / kind, LENGTH)
    spec = importlib.util.spec_from_file_location("make_tasks", EXAMPLE / "make_tasks.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    with (folder / "corpus.jsonl").open("w") as file:
        # of different lengths: some fill several windows, one not even one
        for i, name in enumerate(SOURCES):
            file.write(json.dumps({"text": (ROOT / name).read_text()[: 900 - 100 * i]}) + "\n")
        file.write(json.dumps({"text": "Ein kurzer Text, äöü.\n"}) + "\n")
    maker.main(folder / "corpus.jsonl", folder / "runs" / "eval")
    return folder


def scores(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, model: str, **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """Samples of each task: what lm_eval makes of the command that run.sh gives it."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (workplace / "bin").mkdir(exist_ok=True)
    stand_in = workplace / "bin" / "lm_eval"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        [EXAMPLE / "run.sh", model, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ
        | {"PATH": f"{workplace / 'bin'}:{os.environ['PATH']}", "TASKS": "heldout_text,next_line"}
        | environment,
    )
    monkeypatch.setattr(sys, "argv", ["lm_eval", *done.stdout.splitlines()])
    asked = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    # its own thousands take seconds to list
    manager = TaskManager(include_path=asked.include_path, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=asked.model,
        model_args=asked.model_args,
        tasks=asked.tasks,
        batch_size=asked.batch_size,
        device=asked.device,
        task_manager=manager,
        bootstrap_iters=0,
    )
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
    bits = -sum(row["bits_per_byte"][0] for row in samples["heldout_text"]) / math.log(2)
    assert found["results"]["heldout_text"]["bits_per_byte,none"] == pytest.approx(
        bits / sum(len(row["doc"]["text"].encode()) for row in samples["heldout_text"])
    )
    return samples


def log_likelihoods(samples: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Of every document, then of every choice of every question."""
    return [row["bits_per_byte"][0] for row in samples["heldout_text"]] + [
        float(choice[0][0]) for row in samples["next_line"] for choice in row["resps"]
    ]


def by_the_oracle(folder: Path, mode: str, tokens: list[int], scored: int) -> float:
    """Log-likelihood of the last `scored` tokens, behind as many others as the model takes."""
    row = tokens[-LENGTH - 1 :]
    logits, wanted = oracle_logits(folder, np.array([row[:-1]]), mode)[0, -scored:], row[-scored:]
    top = logits.max(-1, keepdims=True)
    return float(
        (logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))[np.arange(scored), wanted].sum()
    )


@pytest.mark.parametrize(("model", "mode"), [("dtf4", "causal"), ("dtf4", "topk"), ("mod", "causal")])
def test_log_likelihoods_are_the_oracles(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, model: str, mode: str
) -> None:
    """Under causal routing at a batch size of 4 too; run.sh gives top-k one row at a time, for lm_eval pads without a mask."""
    samples = scores(
        workplace, monkeypatch, model, ROUTING=mode, **{"causal": {"BATCH": "4"}, "topk": {}}[mode]
    )
    wanted = []
    for row in samples["heldout_text"]:  # in windows, the last filled up from the left
        tokens = [EOD, *row["doc"]["text"].encode()]
        ends = [*range(LENGTH, len(tokens) - 1, LENGTH), len(tokens) - 1]
        wanted.append(
            sum(
                by_the_oracle(workplace / model, mode, tokens[: end + 1], end - start)
                for start, end in itertools.pairwise([0, *ends])
            )
        )
    for row in samples["next_line"]:
        context = row["doc"]["context"].rstrip()  # lm_eval moves the space at its end to the choice
        for choice in row["doc"]["choices"]:
            text = (row["doc"]["context"] + choice).encode()
            wanted.append(
                by_the_oracle(workplace / model, mode, list(text), len(text) - len(context.encode()))
            )
    found = log_likelihoods(samples)
    assert len(found) == 5 + 4 * 4
    assert found == pytest.approx(wanted, rel=1e-4)
    if (model, mode) == ("dtf4", "causal"):
        assert found == pytest.approx(
            log_likelihoods(scores(workplace, monkeypatch, model, BATCH="1")), rel=1e-5
        )
        assert found != pytest.approx(
            log_likelihoods(scores(workplace, monkeypatch, model, ROUTING="topk")), rel=1e-3
        )


@pytest.mark.parametrize(
    ("folder", "environment", "message"),
    [
        ("mod", {"ROUTING": "topk", "BATCH": "4"}, "BATCH = 4: must be 1 with ROUTING=topk"),
        ("mod", {"ROUTING": "best"}, "ROUTING = best: must be causal or topk"),
        ("nowhere", {}, "nowhere: not a folder written by"),
    ],
)
def test_run_sh_refuses_in_one_sentence(
    workplace: Path, folder: str, environment: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [EXAMPLE / "run.sh", workplace / folder],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
