"""The length of a run and its progress, if the batch size may change when it is resumed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megadyn.config import Config
from megadyn.config.data import Source
from megadyn.data.blend import Blend
from megadyn.data.samples import Samples, Shifted
from megadyn.engine.optimizer import Schedule
from megadyn.errors import ConfigError
from megadyn.planning.flops import training_flops


class Position(NamedTuple):
    """A position in a run."""

    iteration: int = 0
    consumed_samples: int = 0
    """Includes samples of steps that a rollback has undone, because they are not used again."""


class Course:
    """The number of samples that a run had consumed at each iteration."""

    def __init__(self, batch: float):
        """`batch`: samples per step at the start of the run."""
        self._stretches: list[tuple[int, int, float]] = [(0, 0, batch)]
        """(iteration, consumed samples, samples per step from there on), by ascending iteration."""

    def go_on(self, position: Position, batch: int) -> None:
        """From `position` on, a step uses `batch` samples. Later entries were undone and are removed."""
        before = [stretch for stretch in self._stretches if stretch[0] < position.iteration] or [
            (0, 0, batch)
        ]
        self._stretches = before
        if before[-1][2] != batch or self.consumed_at(position.iteration) != position.consumed_samples:
            self._stretches = [*before, (*position, batch)]

    def consumed_at(self, iteration: int) -> float:
        """Samples consumed at `iteration`; for a future one, at the current batch size."""
        start, consumed, batch = [stretch for stretch in self._stretches if stretch[0] <= iteration][-1]
        return consumed + (iteration - start) * batch

    def state(self) -> list[list[float]]:
        return [list(stretch) for stretch in self._stretches]

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> "Course":
        """Reads it from a checkpoint. Earlier versions did not record it; then all steps are assumed to have the same size."""
        course = cls(manifest["consumed_samples"] / max(1, manifest["iteration"]))
        if "course" in manifest:
            course._stretches = [
                (int(start), int(consumed), batch) for start, consumed, batch in manifest["course"]
            ]
        return course


def schedule_of(config: Config, course: Course, position: Position) -> Schedule | None:
    """Progress of the learning rate's schedule. None for a run whose length is given in iterations, if no
    part of the schedule is given in tokens, and for a schedule whose begin or end is given in iterations. Any other run uses
    the consumed samples, so that the rate does not jump when the batch size changes."""
    optimizer = config.optimizer
    if optimizer.is_in_iterations or (config.training.length is None and not optimizer.is_in_tokens):
        return None
    batch, size = config.training.global_batch_size, config.training.tokens_per_step
    passed = position.consumed_samples / batch
    end = passed + (config.training.iterations or 0) - position.iteration
    if optimizer.schedule_tokens is not None:
        end = schedule_steps(config)
    warmup: float = optimizer.warmup_steps(size)
    if optimizer.warmup_tokens is None:
        warmup = course.consumed_at(optimizer.warmup_steps(size)) / batch
    return Schedule(warmup, passed, end, optimizer.decay_steps(size, end))


def schedule_steps(config: Config) -> int:
    """Length of the learning rate's schedule in steps of the current batch size."""
    if config.optimizer.schedule_tokens is None:
        return config.optimizer.span(config.training.iterations or 0)
    return -(-config.optimizer.schedule_tokens // config.training.tokens_per_step)


def settle_length(config: Config, train: Samples, start: Position) -> None:
    """Sets `training.iterations` for a run that continues from `start`.

    Raises:
        ConfigError: the run would repeat samples although `data.repeat` is false, or its length gives no step, or its data begin
            behind `start`.
    """
    if start.consumed_samples < config.data.origin:
        raise ConfigError(
            "data.origin", config.data.origin, f"at most {start.consumed_samples}, what the run has consumed"
        )
    config.training.settle(
        *start,
        epoch_samples=len(train),
        sample_flops=training_flops(config.model, config.training.sequence_length),
    )
    refuse_repeats(config, config.data.sources("train"), train, start)


def refuse_repeats(config: Config, sources: Sequence[Source], train: Samples, start: Position) -> None:
    """Raises ConfigError if the run would repeat a dataset although it may not."""
    wanted, per_step = config.training.samples_at_end(*start), config.training.global_batch_size
    if config.data.repeat or wanted <= len(train):
        return
    mix = train.samples if isinstance(train, Shifted) else train
    first = mix.schedule.supply([len(samples) for samples in mix.sets])[1] if isinstance(mix, Blend) else 0
    most = start.iteration + max(0, len(train) - start.consumed_samples) // per_step
    raise ConfigError(
        "data.repeat",
        False,
        f"true, or training.iterations at most {most}: "
        f"dataset {sources[first].prefix} has no new sample left after {len(train)} of the run's {wanted}",
    )
