"""What experiments of many runs share: each run is a process of its own and a row of a `results.jsonl`, from which tables and
figures are made. Whoever stops an experiment and starts it again repeats no run that has its row.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megadyn.config.data import DataConfig
from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.paths import user_path
from megadyn.report.run import read_run

TOLERANCE = 1e-3
"""Within which the loss of a run that is made again must be that of its row, in nats per token."""
Row = dict[str, Any]
LONGEST = 150
"""Characters in the name of a run's folder."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where runs and rows go, and overrides of every run."""
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR")
    parser.add_argument(
        "--results", type=user_path, metavar="FILE", help="rows (default: OUTPUT/results.jsonl)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def folder_name(name: str, overrides: Iterable[str]) -> str:
    """The name of a run's folder: readable, or, where that is too long for a file system, ended by a hash."""
    whole = "-".join([name, *overrides])
    readable = re.sub(r"[^\w.=+-]+", "_", whole)
    if len(readable) <= LONGEST:
        return readable
    return f"{readable[: LONGEST - 13]}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def train(words: Sequence[str]) -> None:
    """One run on one thread, with a configuration's path and overrides. Raises UserError with its last line if it fails."""
    run_python(["-m", "megadyn.pretrain", *words])


def run_python(words: Sequence[str]) -> None:
    """Python with these words, on one thread, to its end. Raises UserError with its last line if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with LOCK:
        if ENDING.is_set():
            raise UserError(f"{' '.join(words)}: was not begun")
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # a signal to the terminal or the group reaches the run once, by `end_runs_on_signals`
        )
        RUNNING.add(process)
    try:
        _, errors = process.communicate()
    finally:
        process.wait()  # after a signal: until the run has saved
        with LOCK:
            RUNNING.remove(process)
    if process.returncode:
        said = errors.strip().splitlines() or ["no message"]
        raise UserError(f"{' '.join(words)}: {said[-1].removeprefix('error: ')}")


LOCK = threading.RLock()
"""For what follows. The main thread may hold it when a signal arrives."""
ENDING = threading.Event()
"""Whether no more runs begin."""
RUNNING: set["subprocess.Popen[str]"] = set()
"""What `run_python` waits for."""


def end_runs_on_signals() -> None:
    """From now on SIGTERM and Ctrl-C ask the runs at work to save and end, and begin no others; this process ends after them.
    A second signal ends it at once."""

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        with LOCK:
            ENDING.set()
            for process in RUNNING:
                process.terminate()
            if RUNNING:
                os.write(2, f"waiting for runs to save: {len(RUNNING)}\n".encode())
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def records_of(folder: Path) -> tuple[list[Row], Row]:
    """The records of a run's training steps, and that of the validation after the last one. Raises UserError if there is none: a
    run that was asked to stop also ends with status 0."""
    run = read_run(folder, str(folder))
    last = run.evaluations.get("validation", [{}])[-1]
    if not run.is_over or last.get("iteration") != run.last_iteration:
        raise UserError(
            f"the run in {folder} has no validation after its last step, because it was stopped; start again to go on with it, "
            "or remove it if that has been tried"
        )
    return run.training, last


def has_diverged(folder: Path) -> bool:
    """Whether a run in this folder ended because losses, gradients or weights were not finite, or spiked."""
    try:
        run = read_run(folder, str(folder))
    except UserError:  # it did not begin
        return False
    return any("diverged" in record for record in run.events)


def seconds_of(steps: Sequence[Row]) -> float:
    """Of all training steps, also of those before a stop, from the records of some."""
    return round(statistics.mean(step["step_time_ms"] for step in steps) * steps[-1]["iteration"] / 1e3, 1)


def shares_of(record: dict[str, Any]) -> dict[int, float]:
    """Share of the tokens that each routed layer took, from the record of a training step."""
    routing = record.get("routing", {})
    return {
        int(layer): found["routed_fraction"] for layer, found in routing.items() if "routed_fraction" in found
    }


def read_rows(path: Path, names: Iterable[str]) -> list[Row]:
    """The rows of `results.jsonl`; none if there is no file. Raises UserError for a line without one of `names`."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            for name in names:
                row[name]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is not a row of results; remove it") from None
        rows.append(row)
    return rows


def add_row(path: Path, row: Row) -> None:
    """Appends a row in one write, so that an experiment that is stopped leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def text_of(data: DataConfig) -> str:
    """Tells data apart: part of a hash of the tokens of training and validation. Raises UserError if they are not there."""
    sources = [*data.sources("train"), *(of for found in data.validation_sources().values() for of in found)]
    found = hashlib.sha256()
    for source in sources:
        path = f"{source.prefix}.bin"
        with os_errors_named(path), open(path, "rb") as tokens:
            found.update(hashlib.file_digest(tokens, "sha256").digest())
    return found.hexdigest()[:16]


def check_text(rows: Iterable[Row], text: str) -> None:
    """Raises UserError if a row is of a run on other text: two machines may have other versions of it."""
    others = {row["text"] for row in rows} - {text}
    if others:
        raise UserError(
            f"the text here is {text}, but rows are of {', '.join(sorted(others))}: losses cannot be compared. "
            "Make all runs here, with --results of their own"
        )


def check_again(name: str, loss: float | None, before: float | None) -> None:
    """Raises UserError if a run that was made again came out otherwise than its row says. None: it diverged."""
    found, wanted = (math.inf if of is None else of for of in (loss, before))
    if not math.isclose(found, wanted, rel_tol=0, abs_tol=TOLERANCE):
        said = [f"{of:.5f}" if math.isfinite(of) else "none, it diverged" for of in (found, wanted)]
        raise UserError(f"{name}: loss {said[0]}, but its row says {said[1]}")


# ---- tables and figures ----------------------------------------------------------------------------------------------


def mean_and_spread(numbers: Sequence[float], digits: int = 3) -> str:
    """The mean, and the standard deviation if there are several."""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def pyplot() -> Any:
    """matplotlib's, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
