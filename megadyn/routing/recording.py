"""Files of recorded choices. They are independent of the layout that recorded them.

DIR/recording.json                   what was recorded: `About`
DIR/layer-003/step-00000017.npz      one layer in one training step; layers count from 0, steps from 1. numpy arrays;
samples
                                     are in the order of the step's global batch:
    chosen   bool     [samples, T]   chosen tokens; [samples, T, n] if n things are chosen per token
    score    float32  as `chosen`    the score behind the choice
    cut      float32  [samples]      or [samples, n]; chosen tokens score at or above it, others at or below it
    first    int64    []             samples that the run had consumed before the step
"""

import json
import os
import re
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megadyn.errors import UserError
from megadyn.files import os_errors_named, temporary_beside


@dataclass(frozen=True)
class About:
    """Describes a recording."""

    kind: str
    layers: dict[str, str]
    """Type of each layer that chooses, by layer number."""
    samples: int
    """Per step."""
    length: int
    """Tokens per sample."""
    data: str
    """Key of the training data and their order."""
    run: str = ""
    """Folder of the run."""

    def misfit(self, other: "About") -> str | None:
        """How this recording differs from `other`, the description of a run; None if it fits."""
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if field.name != "run" and mine != others:
                if field.name == "data":
                    return "the training data or their order differ from this run's"
                return f"{field.name} {shown(mine)}, but this run has {shown(others)}"
        return None


def shown(value: Any) -> str:
    return ", ".join(f"{key} ({of})" for key, of in value.items()) if isinstance(value, dict) else str(value)


class Recorded(NamedTuple):
    """The content of one file: a layer's choices in a step."""

    chosen: NDArray[np.bool_]
    score: NDArray[np.float32]
    cut: NDArray[np.float32]
    first: int


class Recording:
    """A folder with a recording."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    @property
    def head(self) -> Path:
        return self.folder / "recording.json"

    def about(self) -> About:
        """Raises UserError if there is no recording."""
        try:
            return About(**json.loads(self.head.read_text()))
        except OSError as error:
            raise UserError(
                f"{self.head}: {error.strerror or error}; not a recording of routing choices"
            ) from None
        except (ValueError, TypeError):
            raise UserError(f"{self.head}: damaged, or not a recording of routing choices") from None

    def begin(self, about: About) -> None:
        """Creates the folder. Ranks may do this concurrently: they write the same content."""
        with os_errors_named(self.folder):
            for layer in about.layers:
                self.path(int(layer), 1).parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(self.head)
            temporary.write_text(json.dumps(asdict(about), indent=1) + "\n")
            os.replace(temporary, self.head)

    def path(self, layer: int, step: int) -> Path:
        return self.folder / f"layer-{layer:03d}" / f"step-{step:08d}.npz"

    def steps(self, layer: int) -> set[int]:
        """Recorded steps of a layer."""
        folder = self.path(layer, 1).parent
        names = os.listdir(folder) if folder.is_dir() else []
        return {int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d{8,})\.npz", name))}

    def read(self, layer: int, step: int) -> Recorded:
        """Raises UserError if the file is missing or damaged."""
        path = self.path(layer, step)
        try:
            with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as arrays:
                chosen, score, cut, first = (arrays[name] for name in Recorded._fields)
                return Recorded(chosen, score, cut, int(first))
        except FileNotFoundError:
            raise UserError(f"{path}: missing from the recording") from None
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{path}: damaged, or not a recorded step") from None

    def write(self, layer: int, step: int, recorded: Recorded) -> None:
        path = self.path(layer, step)
        with os_errors_named(path):
            temporary = temporary_beside(path)
            with open(temporary, "wb") as file:
                np.savez(file, allow_pickle=False, **recorded._asdict())
            os.replace(temporary, path)


class Flips(NamedTuple):
    """The choices that differ between two recordings: one entry per token, step and layer."""

    compared: int
    """Number of choices compared, over all steps."""
    steps: NDArray[np.int64]
    layers: NDArray[np.int64]
    distance: NDArray[np.float64]
    """Distance of the token's score from the cut (the larger of the two recordings'), in units of the root mean square
    of the layer's scores in the step."""

    @property
    def changed(self) -> int:
        return len(self.steps)

    @property
    def farthest(self) -> float:
        return float(self.distance.max(initial=0.0))

    @property
    def first(self) -> "Flips":
        """The entries of the first layer and step that differ. Before that, the two runs differ only by rounding."""
        if not self.changed:
            return self
        is_first = (self.steps == self.steps[0]) & (self.layers == self.layers[0])
        return Flips(self.compared, self.steps[is_first], self.layers[is_first], self.distance[is_first])


def flips(a: Path | str, b: Path | str) -> Flips:
    """Compares two recordings of the same kind, model, batch and data, in the steps that both have.

    Raises UserError if they cannot be compared.
    """
    first, second = Recording(a), Recording(b)
    about = first.about()
    if problem := about.misfit(second.about()):
        raise UserError(
            f"{first.folder} cannot be compared with {second.folder}: {problem.replace('this run', 'the other')}"
        )
    layers = [int(layer) for layer in about.layers]
    common = reduce(
        set.intersection, (recording.steps(layer) for recording in (first, second) for layer in layers)
    )
    if not common:
        raise UserError(f"{first.folder} and {second.folder} have no step in common")
    compared = 0
    found: list[tuple[int, int, float]] = []
    for step in sorted(common):
        for layer in layers:
            one, other = first.read(layer, step), second.read(layer, step)
            if one.chosen.shape != other.chosen.shape:
                raise UserError(
                    f"{second.path(layer, step)}: holds {list(other.chosen.shape)} choices, and "
                    f"{first.path(layer, step)} {list(one.chosen.shape)}"
                )
            moved = one.chosen != other.chosen
            compared += moved.size
            if moved.any():
                distance = np.maximum(from_cut(one), from_cut(other))[moved]
                found += [(step, layer, value) for value in distance.tolist()]
    steps, of_layers, distances = zip(*found) if found else ((), (), ())
    return Flips(
        compared, np.array(steps, np.int64), np.array(of_layers, np.int64), np.array(distances, np.float64)
    )


def from_cut(recorded: Recorded) -> NDArray[np.float64]:
    """Distance of every score from its cut, relative to the size of the layer's scores (`Flips.distance`)."""
    score = recorded.score.astype(np.float64)
    size = np.sqrt(np.square(score).mean(axis=(0, 1)))
    distance: NDArray[np.float64] = np.abs(score - np.expand_dims(recorded.cut, 1)) / np.maximum(
        size, np.finfo(np.float64).tiny
    )
    return distance
