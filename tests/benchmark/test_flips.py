"""The comparison of a layout with one process: in short, and its verdict."""

import json
from pathlib import Path

import pytest

from megadyn.benchmark import flips, soak
from megadyn.benchmark.flips import Comparison, as_table
from megadyn.errors import UserError


def test_a_layout_is_held_to_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = soak.prepare(tmp_path)
    argv = [
        "--config",
        str(config),
        "--steps",
        "3",
        "--output",
        str(tmp_path / "flips"),
        "--json",
        "model.routing.kind=dtf",
        "precision=fp32",
        f"deepspeed_config={tmp_path}/fp32.json",
    ]
    flips.main(argv)
    table, _, record = capsys.readouterr().out.strip().rpartition("\n")
    own, recorded = (Comparison(**found) for found in json.loads(record))
    assert (own.run, recorded.run) == ("own", "recorded")
    assert own.steps == recorded.steps == 3
    assert own.compared == 3 * 2 * soak.BATCH * soak.LENGTH
    assert recorded.keeps_promise
    assert "dtf at capacity 0.5, fp32, 3 steps; 2x1x1" in table
    with pytest.raises(UserError, match="flips/one exists already; give --overwrite"):
        flips.main(argv)


@pytest.mark.parametrize("apart", [{"loss": 2e-5}, {"grad_norm": 2e-5}])
def test_the_promise_can_be_broken(apart: dict[str, float]) -> None:
    values = {"loss": 1e-7, "grad_norm": 1e-7} | apart
    found = Comparison(
        "recorded",
        3,
        **values,
        compared=96,
        changed=2,
        first_step=2,
        first_changed=2,
        first_farthest=1e-7,
        farthest=3e-7,
        seconds=1.0,
    )
    assert not found.keeps_promise
    assert as_table([found]).endswith("2 of 96 | 3.0e-07 | step 2: 2, at most 1.0e-07 from the cut |")
