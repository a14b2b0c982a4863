"""The position and state of a run."""

from typing import Any

from megadyn.config import Config
from megadyn.data.samples import Samples
from megadyn.engine.optimizer import learning_rate
from megadyn.log import log
from megadyn.training.length import Course, Position, schedule_of, settle_length
from megadyn.training.loss_rule import LossRule


class RunState:
    """What a checkpoint holds of a run in addition to the engine's state. Equal on all ranks but for `seconds`."""

    def __init__(self, config: Config, train: Samples):
        self.config, self.train = config, train
        self.iteration = 0
        """Number of steps that count; a rollback lowers it."""
        self.consumed_samples = 0
        self.consumed_tokens = 0
        """Of these samples, whatever their lengths were."""
        self.course = Course(config.training.global_batch_size)
        self.seconds = 0.0
        """That its steps have taken, those that a rollback has undone included. Only rank 0's decide and are saved."""
        self.ended_at: int | None = None
        """The iteration at which the run's time was up (`training.seconds`)."""
        self.loss_rule = LossRule(config.training)
        self.saved_at = -1
        """Iteration of the newest complete checkpoint."""
        self.forked_from: str | None = None

    @property
    def total(self) -> int:
        """The number of the last step."""
        return (self.config.training.iterations or 0) if self.ended_at is None else self.ended_at

    @property
    def is_complete(self) -> bool:
        return self.iteration >= self.total

    @property
    def position(self) -> Position:
        return Position(self.iteration, self.consumed_samples)

    def rate(self) -> float:
        """The learning rate of the next step."""
        schedule = schedule_of(self.config, self.course, self.position)
        return learning_rate(self.config.optimizer, self.iteration, self.total, schedule)

    def due(self, interval: int, iteration: int | None = None) -> bool:
        """True at every `interval`-th iteration and at the last; if `interval` is 0, only at the last."""
        iteration = self.iteration if iteration is None else iteration
        return iteration == self.total or (interval > 0 and iteration % interval == 0)

    def step_taken(self, seconds: float) -> None:
        self.iteration += 1
        self.seconds += seconds
        self.consumed_samples += self.config.training.global_batch_size
        self.consumed_tokens += self.config.training.tokens_per_step

    @property
    def is_time_up(self) -> bool:
        """By this rank's clock."""
        limit = self.config.training.seconds
        return limit is not None and self.seconds >= limit

    def end_now(self) -> None:
        """The last step was the run's last: its time is up."""
        self.ended_at = self.iteration
        log.info(
            "the steps have taken %.1f s (training.seconds = %g): the run ends at iteration %d",
            self.seconds,
            self.config.training.seconds,
            self.iteration,
        )

    @property
    def begins_phase(self) -> bool:
        """Whether the next step is the first of a phase of the run."""
        return self.config.phase is not None and self.iteration == self.config.phase.begin

    def set_course(self) -> None:
        """Computes how many steps are left from the current position."""
        self.course.go_on(self.position, self.config.training.global_batch_size)
        settle_length(self.config, self.train, self.position)

    def resume(self, manifest: dict[str, Any]) -> None:
        """Goes on from a checkpoint's position in the data and its time, after `take`."""
        self.consumed_samples = int(manifest["consumed_samples"])
        self.consumed_tokens = tokens_of(manifest)
        self.seconds = manifest.get("seconds", 0.0)
        self.ended_at = self.iteration if self.is_time_up else None

    def take(self, manifest: dict[str, Any]) -> None:
        """Takes over a checkpoint's state, except for consumed samples, because a rollback does not reuse samples."""
        self.iteration = self.saved_at = manifest["iteration"]
        self.course = Course.from_manifest(manifest)
        if manifest["loss_rule"]:
            self.loss_rule.set_state(manifest["loss_rule"])


def tokens_of(manifest: dict[str, Any]) -> int:
    """The tokens that a checkpoint's run had consumed. Without phases all its samples were equally long."""
    known: int | None = manifest.get("consumed_tokens")
    length: int = manifest["training"]["sequence_length"]
    return manifest["consumed_samples"] * length if known is None else known
