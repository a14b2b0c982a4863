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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megadyn.config.data import DataConfig
from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.paths import user_path

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
    start(["-m", "megadyn.pretrain", *words])


def start(words: Sequence[str]) -> None:
    """Python with these words, on one thread. Raises UserError with its last line if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    RUNNING.add(process)
    try:
        _, errors = process.communicate()
    finally:
        process.wait()  # after Ctrl-C, which also reaches the run: until it has saved
        RUNNING.remove(process)
    if process.returncode:
        said = errors.strip().splitlines() or ["no message"]
        raise UserError(f"{' '.join(words)}: {said[-1].removeprefix('error: ')}")


RUNNING: set["subprocess.Popen[str]"] = set()
"""Runs that `start` waits for."""


def end_runs_at_sigterm() -> None:
    """From now on SIGTERM to this process also asks its runs to save and end. Without that they would go on, and hold their
    folders when the experiment is started again."""

    def end(*_: object) -> None:
        for process in RUNNING:
            process.terminate()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def records_of(folder: Path, iterations: int | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of a run's training steps, and that of its last validation. Raises UserError unless that is the one after
    `iterations` steps: a run that was asked to stop also ends with status 0."""
    records = all_records(folder)
    validations = [record for record in records if "validation" in record]
    if not validations or validations[-1]["iteration"] != iterations:
        raise UserError(f"the run in {folder} was stopped before its end; start again to go on with it")
    return [record for record in records if "lm_loss" in record], validations[-1]


def all_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def has_diverged(folder: Path) -> bool:
    """Whether a run in this folder failed because of a loss or a gradient that is not finite, or a spike."""
    return (folder / "metrics.jsonl").exists() and "bad_step" in all_records(folder)[-1]


def seconds_of(steps: Sequence[Row]) -> float:
    """Of all training steps, also of those before a stop, from the records of some."""
    if not steps:
        return 0.0
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
    found, said = (math.inf if of is None else of for of in (loss, before))
    if not math.isclose(found, said, rel_tol=0, abs_tol=TOLERANCE):
        raise UserError(f"{name}: loss {found:.5f}, but its row says {said:.5f}")


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
