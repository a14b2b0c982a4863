"""The tools on a run's own output, as the README shows them."""

import io
import json
import runpy
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.crew import Crew
from tests.helpers.tiny import ROOT


def call(tool: Path, *words: object) -> dict[str, Any]:
    """Runs it in this process, which has loaded torch and transformers already. `test_wheel.py` starts them as a user does."""
    output = io.StringIO()
    with redirect_stdout(output):
        status = runpy.run_path(str(tool))["main"]([str(word) for word in words])
    assert not status
    return json.loads(output.getvalue().splitlines()[-1])


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
    found = call(ROOT / "tools/evaluate.py", "--checkpoint", out, "--data", dataset, "--samples", 8, "--json")
    assert {"topk", "causal", "tokens"} <= set(found)
    for mode in ("topk", "causal"):
        assert found[mode] == pytest.approx(run[mode], rel=1e-5)
    exported = call(
        ROOT / "tools/convert_checkpoint.py", "to-hf", "--checkpoint", out, "--output", out / "hf", "--json"
    )
    assert exported["shards"] == 1
    found = call(
        ROOT / "tools/evaluate.py", "--checkpoint", out / "hf", "--data", dataset, "--samples", 8, "--json"
    )
    assert found["topk"] == pytest.approx(run["topk"], rel=1e-6), (
        "an export knows whether documents were masked"
    )
