"""Reads what a run left in its output folder, without torch. Damaged parts are left out and mentioned in `notes`."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from megadyn.checkpoint.layout import (
    CHECKPOINTS,
    NAME,
    best_of,
    complete_checkpoints,
    damage,
    read_manifest,
)
from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.kinds import Kind, find_kind, keys_of

Values = NDArray[np.float64]
Record = dict[str, Any]

EVALUATIONS = ("validation", "test")
"""Sets without a name; others are `validation/NAME`."""


@dataclass
class Run:
    folder: Path
    name: str
    """Short, and unique on a page."""
    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value; lists stay whole. Empty if there is no readable config.yaml."""
    training: list[Record] = field(default_factory=list)
    """Records of training steps, by ascending iteration."""
    evaluations: dict[str, list[Record]] = field(default_factory=dict)
    """Set name -> records."""
    tasks: list[Record] = field(default_factory=list)
    """Records of scores on tasks, by ascending iteration."""
    events: list[Record] = field(default_factory=list)
    """Records of any other type, in file order."""
    starts: list[Record] = field(default_factory=list)
    """The environment of each start of the run, in order; empty if none was recorded."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what is damaged or unfinished."""

    @property
    def routing(self) -> Kind | None:
        """The run's kind of routing; None if its configuration is unreadable or the kind is not installed here."""
        keys = {
            key.removeprefix("model.routing."): value
            for key, value in self.config.items()
            if key.startswith("model.routing.")
        }
        try:
            kind = find_kind(str(keys.get("kind")))
        except UserError:
            return None
        return kind(**{key: value for key, value in keys.items() if key in keys_of(kind)})

    @property
    def router_warnings(self) -> list[str]:
        """Warnings from training: one sentence per layer and problem, from the last start of the run."""
        found = {}
        for record in self.events:
            warning = record.get("router_warning")
            if isinstance(warning, dict) and isinstance(warning.get("sentence"), str):
                found[(warning.get("layer"), warning.get("problem"))] = warning["sentence"]
        return list(found.values())

    @property
    def slow_ranks(self) -> list[str]:
        """One sentence per rank that was slow, from the last time."""
        found = {}
        for record in self.events:
            slow = record.get("slow_rank")
            if isinstance(slow, dict) and isinstance(slow.get("sentence"), str):
                found[slow.get("rank")] = f"{slow['sentence']}, up to iteration {record['iteration']:,}"
        return list(found.values())

    @property
    def phases(self) -> list[Record]:
        """What was recorded at the begin of each phase, with its `changes`; empty for a run without phases."""
        found = {}
        for record in self.events:
            phase = record.get("phase_begins")
            if isinstance(phase, dict) and isinstance(phase.get("number"), int):
                found[phase["number"]] = phase
        return [found[number] for number in sorted(found)]

    @property
    def ended_by_time(self) -> bool:
        """Whether the run ended because `training.seconds` were over."""
        over = [record for record in self.events if "time_is_up" in record]
        return bool(over) and over[-1]["iteration"] == self.last_iteration

    @property
    def planned_iterations(self) -> int | None:
        """Number of the run's last step, from its newest start or the configuration; None if neither is known."""
        last_start = self.starts[-1] if self.starts else {}
        planned = last_start.get("iterations", self.config.get("training.iterations"))
        return planned if isinstance(planned, int) else None

    @property
    def is_over(self) -> bool:
        """Whether there are records of the last step. A run that was asked to stop also ends with status 0."""
        return self.ended_by_time or self.last_iteration == self.planned_iterations

    @property
    def iterations(self) -> Values:
        return np.array([record["iteration"] for record in self.training], np.float64)

    @property
    def last_iteration(self) -> int:
        records = [*self.training, *(record for found in self.evaluations.values() for record in found)]
        return max((record["iteration"] for record in records), default=0)

    def tokens_at(self, iterations: Values) -> Values:
        """Tokens consumed at these iterations, interpolated between the training records."""
        known = np.concatenate([[0.0], self.iterations])
        return np.interp(iterations, known, np.concatenate([[0.0], self.values("consumed_tokens")]))

    def values(self, *path: str) -> Values:
        """One number per training record, at the path of keys; NaN if it is missing or null."""
        return np.array([number(record, *path) for record in self.training], np.float64)

    def keys_under(self, *path: str) -> list[str]:
        """Names of the numbers at this path in any training record, in the order of the records."""
        found: dict[str, None] = {}
        for record in self.training:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            found |= dict.fromkeys(value if isinstance(value, dict) else ())
        return list(found)

    def evaluated(self, dataset: str, *mode: str) -> tuple[Values, Values]:
        """Iterations and losses on the set `dataset` with routing `topk` or `causal`; in bits per byte with
        `bits_per_byte`, a mode."""
        records = self.evaluations.get(dataset, [])
        return (
            np.array([record["iteration"] for record in records], np.float64),
            np.array([number(record, dataset, *mode) for record in records], np.float64),
        )

    @property
    def named_sets(self) -> list[str]:
        """The validation sets with names, as in the records."""
        return [name for name in self.evaluations if name not in EVALUATIONS]

    def auxiliary(self) -> list[str]:
        """Names of the auxiliary losses."""
        return sorted({name for record in self.training for name in record.get("aux_losses", {})})

    def layer_statistics(self) -> list[str]:
        """Names of all statistics that some layer has, in the order of the records."""
        return list(
            dict.fromkeys(
                name
                for record in self.training
                for layer in record.get("routing", {}).values()
                for name in layer
            )
        )

    def by_layer(self, name: str) -> tuple[list[int], Values]:
        """The layers that have this statistic, and its values [layers, records]."""
        layers = sorted(
            {
                int(layer)
                for record in self.training
                for layer, found in record.get("routing", {}).items()
                if name in found
            }
        )
        return layers, np.array([self.values("routing", str(layer), name) for layer in layers])


def number(record: Record, *path: str) -> float:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else math.nan


def read_runs(folders: list[Path]) -> list[Run]:
    """Raises UserError for a path that is not a folder or contains no metrics."""
    absolute = [folder.resolve() for folder in folders]
    return [read_run(folder, name) for folder, name in zip(absolute, short_names(absolute), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: " + ("not a folder" if folder.exists() else "no such folder"))
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: not the output folder of a run: it holds no {path.name}")
    run = Run(folder, name)
    with os_errors_named(path):
        text = path.read_bytes().decode(errors="replace")
    _take_records(run, text)
    if not (run.training or run.evaluations):
        raise UserError(
            f"{path}: it holds no complete record" + (", only broken lines" if run.notes else " yet")
        )
    _take_config(run)
    _take_starts(run)
    planned = run.planned_iterations
    if run.ended_by_time:
        run.notes.append(
            f"The run ended at iteration {run.last_iteration:,}, when training.seconds were over."
        )
    elif planned is not None and run.last_iteration < planned:
        run.notes.append(
            f"The last record is of iteration {run.last_iteration:,} of {planned:,}: the run is still going, or stopped."
        )
    return run


def _take_records(run: Run, text: str) -> None:
    """Sorts the lines into the lists of `run`. Of two records for one iteration (a run that went back) the later counts."""
    lines = text.splitlines()
    training: dict[int, Record] = {}
    evaluations: dict[str, dict[int, Record]] = {}
    tasks: dict[int, Record] = {}
    broken = []
    for at, line in enumerate(lines, start=1):
        record = whole_record(line)
        if record is None:
            broken.append(at)
        elif "lm_loss" in record:
            training[record["iteration"]] = record
        elif found := [name for name in record if name in EVALUATIONS or name.startswith("validation/")]:
            evaluations.setdefault(found[0], {})[record["iteration"]] = record
        elif isinstance(record.get("tasks"), dict):
            tasks[record["iteration"]] = record
        else:
            run.events.append(record)
    run.tasks = [tasks[at] for at in sorted(tasks)]
    run.training = [training[at] for at in sorted(training)]
    run.evaluations = {name: [found[at] for at in sorted(found)] for name, found in evaluations.items()}
    if broken and broken[-1] == len(lines):
        run.notes.append(
            "The last line of metrics.jsonl is incomplete and was left out: the run was killed or is writing it."
        )
        broken.pop()
    if broken:
        run.notes.append(
            f"Left out as incomplete: {len(broken)} line(s) of metrics.jsonl, the first of them {broken[0]}."
        )


def whole_record(line: str) -> Record | None:
    """The record in a line of metrics.jsonl; None if the line is not a complete record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
        return None
    routing = record.get("routing", {})
    sound = (
        isinstance(record.get("aux_losses", {}), dict)
        and isinstance(routing, dict)
        and all(layer.isdecimal() and isinstance(found, dict) for layer, found in routing.items())
    )
    return record if sound else None


def _take_config(run: Run) -> None:
    path = run.folder / "config.yaml"
    try:
        run.config_text = path.read_text()
        run.config = flat(OmegaConf.to_container(OmegaConf.create(run.config_text)))
    except OSError as error:
        run.notes.append(f"config.yaml cannot be read ({error.strerror or error}).")
    except Exception as error:  # the YAML library has no common base for its errors
        run.notes.append(f"config.yaml is not valid YAML ({' '.join(str(error).split())}).")


def _take_starts(run: Run) -> None:
    """Runs of earlier versions have no such file."""
    path = run.folder / "environment.jsonl"
    if not path.exists():
        return
    with os_errors_named(path):
        lines = path.read_bytes().decode(errors="replace").splitlines()
    found = [whole_record(line) for line in lines]
    run.starts = [record for record in found if record is not None]
    if broken := found.count(None):
        run.notes.append(f"Left out as incomplete: {broken} line(s) of {path.name}.")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested sections to dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Keys that differ, with both values as YAML; `-` if one has no such key."""

    def shown(config: dict[str, Any], key: str) -> str:
        return json.dumps(config[key], ensure_ascii=False) if key in config else "-"

    keys = dict.fromkeys([*first, *second])
    return [
        (key, shown(first, key), shown(second, key))
        for key in keys
        if shown(first, key) != shown(second, key)
    ]


def short_names(folders: list[Path]) -> list[str]:
    """The last parts of each path, as many as needed to be unique; numbered if the paths are equal."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({i})" for i, folder in enumerate(folders, start=1)]


class Checkpoint(NamedTuple):
    folder: Path
    iteration: int
    bytes: int
    """Size of all its files on disk."""
    problem: str | None
    """What is damaged; None if it is intact."""
    is_used: bool
    """False if the run has since gone back before it."""
    topology: dict[str, int]
    best: tuple[str, float] | None = None
    """The validation set and the loss by which it is the run's best."""


def read_checkpoints(run: Path) -> list[Checkpoint]:
    """All checkpoints of a run, newest first; each file is checked against its sha256."""
    root = run / CHECKPOINTS
    folders = [path for path in root.glob("iteration-*") if NAME.match(path.name) and path.is_dir()]
    used = set(complete_checkpoints(root))
    return [
        _checkpoint(folder, folder in used)
        for folder in sorted(folders, key=lambda path: path.name, reverse=True)
    ]


def _checkpoint(folder: Path, is_used: bool) -> Checkpoint:
    topology: dict[str, int] = {}
    with os_errors_named(folder):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        try:
            manifest = read_manifest(folder)
            topology, problem = manifest["topology"], damage(folder, sorted(manifest["files"]))
        except UserError as error:
            problem = str(error)
    return Checkpoint(
        folder, int(folder.name.rpartition("-")[2]), size, problem, is_used, topology, best_of(folder)
    )
