"""How long a run is and how far it has come, where the batch size may have changed between its starts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megadyn.config import Config
from megadyn.config.data import Source
from megadyn.data.blend import Blend
from megadyn.data.samples import Samples
from megadyn.engine.optimizer import Schedule
from megadyn.errors import ConfigError


class Position(NamedTuple):
    """Where a run stands."""

    iteration: int = 0
    consumed_samples: int = 0
    """Also those of steps that a rollback has undone: they are not used again."""


class Course:
    """How many samples a run had consumed at each of its iterations."""

    def __init__(self, batch: float):
        """Of a run that begins with `batch` samples a step."""
        self._stretches: list[tuple[int, int, float]] = [(0, 0, batch)]
        """(iteration, consumed samples, samples per step from there on), of rising iterations."""

    def go_on(self, position: Position, batch: int) -> None:
        """From `position` on, a step takes `batch` samples. What lay beyond has been undone."""
        before = [stretch for stretch in self._stretches if stretch[0] < position.iteration] or [
            (0, 0, batch)
        ]
        self._stretches = before
        if before[-1][2] != batch or self.consumed_at(position.iteration) != position.consumed_samples:
            self._stretches = [*before, (*position, batch)]

    def consumed_at(self, iteration: int) -> float:
        """Samples consumed at `iteration`; for one that is still to come, at the present batch size."""
        start, consumed, batch = [stretch for stretch in self._stretches if stretch[0] <= iteration][-1]
        return consumed + (iteration - start) * batch

    def state(self) -> list[list[float]]:
        return [list(stretch) for stretch in self._stretches]

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> "Course":
        """Of a checkpoint. Earlier versions did not record it: then all its steps count as of one size."""
        course = cls(manifest["consumed_samples"] / max(1, manifest["iteration"]))
        if "course" in manifest:
            course._stretches = [
                (int(start), int(consumed), batch) for start, consumed, batch in manifest["course"]
            ]
        return course


def schedule_of(config: Config, course: Course, position: Position) -> Schedule | None:
    """How far the learning rate's schedule has come. A run of so many iterations goes by these (None), any other by what it
    has consumed: its rate does not jump where the batch size changes."""
    if config.training.length is None:
        return None
    batch = config.training.global_batch_size
    passed = position.consumed_samples / batch
    return Schedule(
        course.consumed_at(config.optimizer.warmup_iterations) / batch,
        passed,
        passed + (config.training.iterations or 0) - position.iteration,
    )


def settle_length(config: Config, train: Samples, start: Position) -> None:
    """Sets `training.iterations` for a run that goes on from `start`.

    Raises:
        ConfigError: the run would use a sample twice and may not (`data.repeat`), or is given in epochs and makes no step.
    """
    config.training.settle(len(train), *start)
    refuse_repeats(config, config.data.sources("train"), train, start)


def refuse_repeats(config: Config, sources: Sequence[Source], train: Samples, start: Position) -> None:
    """ConfigError if the run would use a dataset twice and may not."""
    wanted, per_step = config.training.samples_at_end(*start), config.training.global_batch_size
    if config.data.repeat or wanted <= len(train):
        return
    first = (
        train.schedule.supply([len(samples) for samples in train.sets])[1] if isinstance(train, Blend) else 0
    )
    most = start.iteration + max(0, len(train) - start.consumed_samples) // per_step
    raise ConfigError(
        "data.repeat",
        False,
        f"true, or training.iterations at most {most}: "
        f"dataset {sources[first].prefix} has no new sample left after {len(train)} of the run's {wanted}",
    )
