"""The comparison of a layout with one process: in short, and its verdict."""

import json
from pathlib import Path

import numpy as np
import pytest

from megadyn.benchmark import flips, soak
from megadyn.benchmark.flips import Comparison, as_table
from megadyn.benchmark.soak_bounds import Curves
from megadyn.errors import UserError
from megadyn.routing.recording import About, Recorded, Recording


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
    assert recorded.together == 3
    assert max(recorded.loss, recorded.grad_norm) < 1e-5
    assert "dtf at capacity 0.5, fp32, 3 steps; 2x1x1" in table
    with pytest.raises(UserError, match="flips/one exists already; give --overwrite"):
        flips.main(argv)


def curves(**values: list[float]) -> Curves:
    return Curves(
        [1, 2, 3],
        **{"loss": [4.0, 3.0, 2.0], "grad_norm": [1.0, 1.0, 1.0]} | values,
        layers={},
        validation={},
    )


@pytest.mark.parametrize(
    ("found", "together"),
    [
        (curves(), 3),
        (curves(loss=[4.0, 3.0 * (1 + 2e-5), 2.0]), 1),
        (curves(grad_norm=[1.0, 1.0, 1.0 - 2e-5]), 2),
    ],
)
def test_the_promise_can_be_broken(found: Curves, together: int, tmp_path: Path) -> None:
    chosen = np.array([[True, False]])
    about = About("dtf", {"1": "dtf_dynamic"}, samples=1, length=2, data="data")
    for name, now in (("one", chosen), ("other", ~chosen)):
        recording = Recording(tmp_path / name / flips.CHOICES)
        recording.begin(about)
        recording.write(
            1, 2, Recorded(now, np.array([[1.0, 1.0]], np.float32), np.array([1 - 1e-3], np.float32), 0)
        )
    compared = flips.compare("recorded", tmp_path / "one", tmp_path / "other", curves(), found, 1.0)
    assert (compared.together, compared.first_step) == (together, 2)
    assert as_table([compared]).endswith(
        "2 of 2, at most 1.0e-03 from the cut | step 2: 2, at most 1.0e-03 from the cut |"
    )


def test_curves_that_part_too_early_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parted = Comparison("recorded", 200, 2e-4, 9e-3, 24, 96, 0, None, 0, 0.0, 0.0, 1.0)
    monkeypatch.setattr(flips, "measure", lambda args: [parted])
    argv = ["--config", str(soak.prepare(tmp_path)), "precision=fp32"]
    flips.main(argv)
    with pytest.raises(SystemExit, match="1"):
        flips.main([*argv, "--hold", "25"])
    assert "within" in capsys.readouterr().out
