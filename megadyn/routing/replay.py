"""Training with recorded choices: `training.routing_record` and `training.routing_replay`.

A recording is independent of the layout: at the end of a step the data-parallel ranks gather their choices, and the
first rank of each pipeline stage writes them. In a replay each rank reads the rows of its own samples. So all ranks
need access to the folder, as they do to `output_dir`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megadyn.config import Config
from megadyn.errors import ConfigError, UserError
from megadyn.parallel.grid import Grid
from megadyn.parallel.mappings import whole_batch
from megadyn.routing.choice import Tape
from megadyn.routing.layer import RoutedLayer
from megadyn.routing.recording import About, Recorded, Recording


def about_run(config: Config, choosing: Mapping[int, str], data_key: str) -> About:
    """Describes a recording of this run. `choosing`: layers that choose, with their types; `data_key`: key of the samples."""
    return About(
        config.model.routing.name,
        {str(layer): kind for layer, kind in choosing.items()},
        config.training.global_batch_size,
        config.training.sequence_length,
        data_key,
        str(Path(config.output_dir).resolve()),
    )


def refuse_replay(config: Config, choosing: Mapping[int, str], data_key: str, iteration: int) -> None:
    """Raises UserError if the run, now at `iteration`, cannot record or replay as configured."""
    training = config.training
    for key in ("routing_record", "routing_replay"):
        if (folder := getattr(training, key)) is not None and not choosing:
            raise ConfigError(
                f"training.{key}",
                folder,
                f"left out with {config.model.routing.describe()}, because no layer chooses tokens",
            )
    about = about_run(config, choosing, data_key)
    if training.routing_record is not None:
        recording = Recording(training.routing_record)
        if recording.head.exists() and recording.about() != about:
            raise ConfigError(
                "training.routing_record",
                training.routing_record,
                "an empty folder, or this run's own: it holds "
                f"a recording of {recording.about().run}" + same_run(recording.about(), about),
            )
    if training.routing_replay is not None:
        recording = Recording(training.routing_replay)
        if problem := recording.about().misfit(about):
            raise UserError(f"{recording.head}: does not fit this run: {problem}")
        for layer in choosing:
            there = recording.steps(layer)
            if missing := [
                step for step in range(iteration + 1, (training.iterations or 0) + 1) if step not in there
            ]:
                raise UserError(
                    f"{recording.path(layer, missing[0])}: missing from the recording, like {len(missing) - 1} "
                    f"more of the steps {iteration + 1} to {training.iterations} of this run"
                )


def same_run(found: About, about: About) -> str:
    """If the recording is from this run itself: how it differs from what the run would record now."""
    return f": {found.misfit(about)}" if found.run == about.run else ""


class Replay:
    """Records the choices of a rank's layers in each step, or replaces them by recorded ones; does nothing unless configured."""

    def __init__(
        self,
        config: Config,
        layers: Sequence[RoutedLayer],
        choosing: Mapping[int, str],
        grid: Grid,
        data_key: str,
    ):
        """`layers`: this rank's layers; those in `choosing` choose tokens."""
        training = config.training
        self.grid = grid
        self.layers = [layer for layer in layers if layer.index in choosing]
        self.about = about_run(config, choosing, data_key)
        self.samples = training.global_batch_size // grid.dp.size
        self.source = None if training.routing_replay is None else Recording(training.routing_replay)
        self.record = None if training.routing_record is None else Recording(training.routing_record)
        self.has_begun = False

    @contextmanager
    def step(self, number: int, consumed: int) -> Iterator[None]:
        """Wraps training step `number`, which begins after `consumed` samples. Collective. Raises UserError if a file
        is missing, damaged or for other samples, and for a layer that bypasses its `decisions`."""
        if self.source is None and self.record is None:
            yield
            return
        for layer in self.layers:
            layer.decisions.tape = Tape(
                self.samples, *self.given(layer.index, number, consumed), keeps=self.record is not None
            )
        try:
            yield
            for layer in self.layers:
                self.end_step(layer, number, consumed)
        finally:
            for layer in self.layers:
                layer.decisions.tape = None

    def given(self, layer: int, number: int, consumed: int) -> tuple[Tensor | None, str]:
        """The recorded choices for this rank's samples, and their source."""
        if self.source is None:
            return None, ""
        path, found = self.source.path(layer, number), self.source.read(layer, number)
        if found.first != consumed:
            raise UserError(
                f"{path}: was recorded from sample {found.first} of its run on, but the step begins at sample {consumed}"
            )
        want = (self.about.samples, self.about.length)
        if found.chosen.dtype != bool or found.chosen.shape[:2] != want:
            raise UserError(
                f"{path}: holds {found.chosen.dtype} {list(found.chosen.shape)}: must be bool {list(want)}"
            )
        first = self.grid.dp.rank * self.samples
        return torch.from_numpy(found.chosen[first : first + self.samples]), str(path)

    def end_step(self, layer: RoutedLayer, number: int, consumed: int) -> None:
        tape = layer.decisions.tape
        assert tape is not None
        if tape.passed != tape.samples:
            kind = self.about.layers[str(layer.index)]
            raise UserError(
                f"layer {layer.index} ({kind}) cannot be recorded or replayed: each of the step's "
                f"{tape.samples} samples must pass through RoutedLayer.decisions once, but {tape.passed} did"
            )
        if self.record is None or self.grid.tp.rank:
            return
        mine = tape.whole()
        chosen, score, cut = (
            whole_batch(x, self.grid.dp) for x in (mine.chosen.byte(), mine.score, mine.cut)
        )
        if self.grid.dp.rank == 0:
            if not self.has_begun:
                self.record.begin(self.about)
                self.has_begun = True
            self.record.write(
                layer.index,
                number,
                Recorded(chosen.bool().cpu().numpy(), score.cpu().numpy(), cut.cpu().numpy(), consumed),
            )
