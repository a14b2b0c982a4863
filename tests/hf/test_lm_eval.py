"""lm_eval's scores of an exported folder on real text, as examples/eval/run.sh asks for them, against the oracle's."""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import numpy as np
import pytest
import yaml
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
NEEDED = "import jieba, fuzzywuzzy, rouge"
"""What longbench.sh asks Python for."""
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
    """Samples of both local tasks: what lm_eval makes of the command that run.sh gives it."""
    found = evaluated(workplace, monkeypatch, model, TASKS="heldout_text,next_line", **environment)
    samples = sorted_samples(found)
    bits = -sum(row["bits_per_byte"][0] for row in samples["heldout_text"]) / math.log(2)
    assert found["results"]["heldout_text"]["bits_per_byte,none"] == pytest.approx(
        bits / sum(len(row["doc"]["text"].encode()) for row in samples["heldout_text"])
    )
    return samples


def sorted_samples(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}


def stand_ins(workplace: Path, **programs: str) -> str:
    """A PATH on which shell scripts take the place of programs."""
    (workplace / "bin").mkdir(exist_ok=True)
    for name, script in programs.items():
        (workplace / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (workplace / "bin" / name).chmod(0o755)
    return f"{workplace / 'bin'}:{os.environ['PATH']}"


WORDS = 'printf "%s\\n" "$@"'
"""A script that prints its arguments."""


def evaluated(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, model: str, **environment: str
) -> dict[str, Any]:
    """What lm_eval makes of the command that run.sh gives it."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = subprocess.run(
        [EXAMPLE / "run.sh", model, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": stand_ins(workplace, lm_eval=WORDS)} | environment,
    )
    monkeypatch.setattr(sys, "argv", ["lm_eval", *done.stdout.splitlines()])
    asked = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    # its own thousands take seconds to list
    manager = TaskManager(include_path=asked.include_path, include_defaults=False)
    return lm_eval.simple_evaluate(
        model=asked.model,
        model_args=asked.model_args,
        tasks=asked.tasks,
        batch_size=asked.batch_size,
        device=asked.device,
        task_manager=manager,
        bootstrap_iters=0,
    )


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


def test_tiny_mmlu_is_the_share_of_its_questions_that_are_right(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On questions in a folder of the dataset's name, because the dataset needs the network."""
    folder = workplace / "tinyBenchmarks" / "tinyMMLU"
    folder.mkdir(parents=True)
    head = {"configs": [{"config_name": "all", "data_files": [{"split": "test", "path": "test.jsonl"}]}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n")
    asked = ["One and one?\nAnswer:", "Nought and one?\nAnswer:", "Two and one?\nAnswer:"]
    rows = [{"input_formatted": text, "answer": i, "subject": "sums"} for i, text in enumerate(asked)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluated(workplace, monkeypatch, "dtf4", TASKS="tiny_mmlu", BATCH="4")
    right = []
    for row in sorted_samples(found)["tiny_mmlu"]:
        chances = [float(choice[0][0]) for choice in row["resps"]]
        texts = [list(f"{row['doc']['input_formatted']} {letter}".encode()) for letter in "ABCD"]
        wanted = [by_the_oracle(workplace / "dtf4", "causal", text, 2) for text in texts]
        assert chances == pytest.approx(wanted, rel=1e-4)
        right.append(int(np.argmax(chances)) == row["doc"]["answer"])
    assert len(right) == 3
    assert found["results"]["tiny_mmlu"]["acc,none"] == pytest.approx(sum(right) / 3)


def run_longbench(
    workplace: Path, folder: str, path: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EXAMPLE / "longbench.sh", workplace / folder, "--limit", "2"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path} | environment,
    )


def test_longbench_asks_for_tasks_that_lm_eval_has(workplace: Path) -> None:
    path = stand_ins(workplace, lm_eval=WORDS, python=f'[ "$2" = "{NEEDED}" ] || exec {sys.executable} "$@"')
    done = run_longbench(workplace, "mod", path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    options = dict(zip(words[:-2:2], words[1:-2:2], strict=True))
    assert options["--tasks"] == "longbench_en" and options["--batch_size"] == "1"
    assert options["--model_args"].endswith(",routing_mode=causal") and words[-2:] == ["--limit", "2"]
    assert done.stderr == (
        f"prompts of more than {LENGTH} tokens, less those of the answer, lose their beginning\n"
    )
    group = yaml.safe_load((Path(options["--include_path"]) / "longbench_en.yaml").read_text())
    theirs = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    names = {re.search(r"^task: (\S+)$", file.read_text(), re.M) for file in theirs.glob("[!_]*.yaml")}
    assert set(group["task"]) <= {name[1] for name in names if name}
    assert len(set(group["task"])) == len(group["task"]) == 16


@pytest.mark.parametrize(
    ("folder", "environment", "message"),
    [
        ("mod", {}, "LongBench's scores need more packages (pip install 'lm_eval[longbench]')"),
        ("mod", {"ROUTING": "topk"}, "ROUTING = topk: must be causal, because LongBench generates"),
        ("nowhere", {}, "nowhere: not a folder written by"),
    ],
)
def test_longbench_refuses_in_one_sentence(
    workplace: Path, folder: str, environment: dict[str, str], message: str
) -> None:
    done = run_longbench(
        workplace, folder, stand_ins(workplace, lm_eval=WORDS, python="exit 1"), **environment
    )
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


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
