"""Sinks for records: metrics.jsonl, TensorBoard, metrics.csv, Weights & Biases. Rank 0 only.

A record is an object with an `iteration`. When a run goes back, records of later iterations are dropped, or overdrawn
in sinks that cannot drop records.
"""

import importlib.util
import io
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megadyn.config import Config
from megadyn.config.logging import LoggingConfig
from megadyn.errors import ConfigError, UserError, one_line
from megadyn.files import os_errors_named
from megadyn.log import log

Record = dict[str, Any]


class Sink(Protocol):
    """Opened for a run at some iteration; invalid input is then a UserError. Later, every method may raise OSError. It
    must then have done nothing, or only what a repeated call corrects."""

    name: str
    """Name for the log."""

    def write(self, record: Record) -> None: ...

    def go_back(self, iteration: int) -> None: ...

    def close(self) -> None: ...


def open_sinks(config: Config, folder: Path, iteration: int) -> list[Sink]:
    """All sinks in the configuration, for a run at `iteration`."""
    asked = config.logging
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", iteration)]
    if asked.csv:
        sinks.append(CsvRows(folder / "metrics.csv", iteration))
    if asked.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", iteration))
    if asked.wandb != "none":
        sinks.append(WeightsAndBiases(config, folder, iteration))
    return sinks


class Lines:
    """A file in which each line belongs to an iteration. It is reopened for each record, so that after a failure no
    buffer differs from the disk."""

    header = ""
    """First line of the file."""
    lines: Callable[[Record], str]
    """Returns what to append for a record; a method of each subclass, like the next."""
    iteration_of: Callable[[str], int]
    """The iteration of a line. Raises ValueError for an incomplete line."""

    def __init__(self, path: Path, iteration: int):
        self.path, self.name = path, path.name
        with os_errors_named(path):
            self.go_back(iteration)

    def write(self, record: Record) -> None:
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        append(self.path, ((self.header if is_new else "") + self.lines(record)).encode())

    def go_back(self, iteration: int) -> None:
        keep_lines(
            self.path,
            lambda line: line == self.header or self.iteration_of(line) <= iteration,
            at_start=iteration == 0,
        )

    def close(self) -> None:
        pass  # no file is kept open


class JsonLines(Lines):
    """One record per line."""

    def lines(self, record: Record) -> str:
        return json.dumps(finite(record), allow_nan=False) + "\n"

    def iteration_of(self, line: str) -> int:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            raise ValueError("no record")
        return int(record["iteration"])


class CsvRows(Lines):
    """Rows of iteration, name and value, so that records with different fields need no common columns."""

    header = "iteration,name,value\n"

    def lines(self, record: Record) -> str:
        return "".join(f"{record['iteration']},{name},{value}\n" for name, value in flat_scalars(record))

    def iteration_of(self, line: str) -> int:
        iteration, _, value = line.split(",")  # names have no commas
        float(value)
        return int(iteration)


class TensorBoard:
    """One event per record, one file per start. Uses TensorBoard's building blocks and writes immediately, because its
    own writer runs in a thread that stops for good at the first error."""

    name = "tensorboard"

    def __init__(self, folder: Path, iteration: int):
        self.path = folder / f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        with os_errors_named(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.go_back(iteration)

    def write(self, record: Record) -> None:
        self._append(
            step=record["iteration"],
            summary={
                "value": [{"tag": name, "simple_value": float(value)} for name, value in flat_scalars(record)]
            },
        )

    def go_back(self, iteration: int) -> None:
        """Appends a start mark, which hides later events that were written before it."""
        self._append(step=iteration + 1, session_log={"status": "START"})

    def _append(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        content = io.BytesIO()
        file = RecordWriter(content)
        if not self.path.exists() or self.path.stat().st_size == 0:
            file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        file.write(Event(wall_time=time.time(), **event).SerializeToString())
        append(self.path, content.getvalue())

    def close(self) -> None:
        pass  # no file is kept open


class WeightsAndBiases:
    """A W&B run, which a resumed run continues. Curves are drawn over `iteration`, not over W&B's own step, which can
    only rise. So a run that goes back overdraws its earlier points. Closing it ends W&B's service in this process."""

    name = "Weights & Biases"

    def __init__(self, config: Config, folder: Path, iteration: int):
        import wandb

        asked = config.logging
        try:
            self.run = wandb.init(
                project=asked.wandb_project,
                entity=asked.wandb_entity,
                name=folder.resolve().name,
                dir=str(folder),
                mode="offline" if asked.wandb == "offline" else "online",
                id=self._id(folder, iteration == 0),
                resume="allow",
                config=asdict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(f"logging.wandb = {asked.wandb}: {one_line(error)}") from None
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    @staticmethod
    def _id(folder: Path, is_new: bool) -> str:
        path = folder / "wandb-id"
        if is_new or not path.exists():
            path.write_text(f"{secrets.token_hex(4)}\n")
        return path.read_text().strip()

    def write(self, record: Record) -> None:
        with service_errors_named():
            self.run.log({"iteration": record["iteration"], **dict(flat_scalars(record))})

    def go_back(self, iteration: int) -> None:
        pass  # see the class docstring

    def close(self) -> None:
        import wandb

        with service_errors_named():
            self.run.finish()
            wandb.teardown()  # `finish` may return before the service has written the last records of an offline run


@contextmanager
def service_errors_named() -> Iterator[None]:
    """Turns every failure of W&B's service into an OSError, like that of a full disk, so that none ends a run."""
    try:
        yield
    except Exception as error:
        raise OSError(one_line(error)) from error


def refuse_wandb(asked: LoggingConfig) -> None:
    """Raises ConfigError if W&B is enabled but not installed. Imports nothing."""
    if asked.wandb != "none" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "logging.wandb", asked.wandb, "none: the wandb package is missing (pip install wandb)"
        )


def refuse_wandb_login(asked: LoggingConfig) -> None:
    """Raises ConfigError if W&B is enabled online without a login. Asks the service."""
    if asked.wandb != "online":
        return
    import wandb

    try:
        problem = "" if wandb.login(prompt=False) else "nobody is logged in"
    except wandb.Error as error:
        problem = one_line(error)
    if problem:
        raise ConfigError(
            "logging.wandb",
            "online",
            f"offline or none, or first run `wandb login` or set WANDB_API_KEY: {problem}",
        )


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON lacks; an fp16 gradient norm that overflowed is infinite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat_scalars(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    """All numbers in a metrics record except its iteration, with names like `a/b/c`."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += flat_scalars(value, f"{prefix}{key}/")
        elif key != "iteration" and isinstance(value, (int, float)):
            found.append((prefix + key, value))
    return found


def append(path: Path, content: bytes) -> None:
    """Appends all of `content`, or nothing if that fails."""
    with path.open("ab", buffering=0) as file:
        end, left = file.tell(), memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


def keep_lines(path: Path, is_kept: Callable[[str], bool], *, at_start: bool) -> None:
    """Drops the lines of steps that a resumed run will repeat, and incomplete ones (ValueError from `is_kept`). At the
    start of a new run (`at_start`) drops all lines."""
    if not path.exists():
        return
    kept = []
    for line in [] if at_start else path.read_text(errors="replace").splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                raise ValueError("cut off")
            if is_kept(line):
                kept.append(line)
        except ValueError:
            log.warning("%s: an incomplete line was dropped", path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
