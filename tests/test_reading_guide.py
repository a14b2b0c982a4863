"""CONTRIBUTING's guide through one training step of DTF says how many files it takes, and names the ones to read."""

import json
import re
import sys
import threading
from pathlib import Path
from types import FrameType

from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import ROOT, micro_batches
from tests.parity.curves import Case, config_of, tokens_of

MOST = 20
LOOP = "pretrain.py"
"""Calls `Engine.train_step`, where the trace begins."""


def guide() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text[text.index("Reading guide: one step of DTF") :].split("\n## ")[0]


def test_the_guide_counts_the_files_of_a_step_and_names_only_those(tmp_path: Path) -> None:
    run_on_ranks(_trace, 1, str(tmp_path / "files.json"))
    called = {LOOP, *json.loads((tmp_path / "files.json").read_text())}
    assert len(called) <= MOST, sorted(called)
    assert "engine/step_clock.py" not in called  # a step that is not measured looks at no clock
    (said,) = re.findall(r"takes (\d+) files", guide())
    assert int(said) == len(called), sorted(called)
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", guide())) - {"tests/test_reading_guide.py"}
    assert named <= called, named - called


def _trace(output: str) -> None:
    """Writes which files of megadyn have a function that the second step of a tiny DTF run calls, backward threads included."""
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.launch import launch
    from megadyn.parallel.grid import make_grid

    launch.join()
    case = Case("dtf")
    config = config_of(case)
    engine = Engine(config, batch_plan(config, 1), make_grid(1, 1), None)
    samples, called = tokens_of(case), set()
    root = str(ROOT / "megadyn") + "/"

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            called.add(frame.f_code.co_filename.removeprefix(root))

    engine.train_step(micro_batches(samples[0], case.micro_batch), 1e-3)
    sys.setprofile(note)
    threading.setprofile(note)
    engine.train_step(micro_batches(samples[1], case.micro_batch), 1e-3)
    sys.setprofile(None)
    threading.setprofile(None)
    Path(output).write_text(json.dumps(sorted(called)))
