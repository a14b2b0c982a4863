"""The tools on a run's own output, as the README shows them."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.crew import Crew
from tests.helpers.tiny import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def call_here(tool: Path, *words: object) -> dict[str, Any]:
    """As `call`, in this process, which has loaded torch and transformers already."""
    output = io.StringIO()
    with redirect_stdout(output):
        status = runpy.run_path(str(tool))["main"]([str(word) for word in words])
    assert not status
    return json.loads(output.getvalue().splitlines()[-1])


def call(*words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if "--json" in words else {}


@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_of_checkpoint_and_export_is_the_runs_own(
    masked: bool, config_file: Path, dataset: Path
) -> None:
    crew = Crew(
        config_file, f"data.validation={dataset}", f"data.document_mask={masked}", "model.routing.kind=mod"
    )
    assert crew.wait() == [0], crew.output()
    out = config_file.parent / "out"
    run = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]["validation"]
    tool = call_here if masked else call  # once as a user calls them
    found = tool(ROOT / "tools/evaluate.py", "--checkpoint", out, "--data", dataset, "--samples", 8, "--json")
    assert {"topk", "causal", "tokens"} <= set(found)
    for mode in ("topk", "causal"):
        assert found[mode] == pytest.approx(run[mode], rel=1e-5)
    exported = tool(
        ROOT / "tools/convert_checkpoint.py", "to-hf", "--checkpoint", out, "--output", out / "hf", "--json"
    )
    assert exported["shards"] == 1
    found = tool(
        ROOT / "tools/evaluate.py", "--checkpoint", out / "hf", "--data", dataset, "--samples", 8, "--json"
    )
    assert found["topk"] == pytest.approx(run["topk"], rel=1e-6), (
        "an export knows whether documents were masked"
    )
