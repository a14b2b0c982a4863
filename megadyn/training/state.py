"""Where a run stands."""

from typing import Any

from megadyn.config import Config
from megadyn.data.samples import Samples
from megadyn.engine.optimizer import learning_rate
from megadyn.training.length import Course, Position, schedule_of, settle_length
from megadyn.training.loss_rule import LossRule


class RunState:
    """What a checkpoint holds of a run, beside the engine's state. Equal on all ranks."""

    def __init__(self, config: Config, train: Samples):
        self.config, self.train = config, train
        self.iteration = 0
        """Steps that count: a rollback lowers it."""
        self.consumed_samples = 0
        self.course = Course(config.training.global_batch_size)
        self.loss_rule = LossRule(config.training)
        self.saved_at = -1
        """The newest whole checkpoint's iteration."""
        self.forked_from: str | None = None

    @property
    def total(self) -> int:
        """The number of the last step."""
        return self.config.training.iterations or 0

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
        """At every `interval`-th iteration and the last; at the last only where `interval` is 0."""
        iteration = self.iteration if iteration is None else iteration
        return iteration == self.total or (interval > 0 and iteration % interval == 0)

    def step_taken(self) -> None:
        self.iteration += 1
        self.consumed_samples += self.config.training.global_batch_size

    def set_course(self) -> None:
        """Works out, from where the run stands, how many steps are left."""
        self.course.go_on(self.position, self.config.training.global_batch_size)
        settle_length(self.config, self.train, self.position)

    def take(self, manifest: dict[str, Any]) -> None:
        """Stands where a checkpoint stood, but for the samples consumed, which a rollback does not give back."""
        self.iteration = self.saved_at = manifest["iteration"]
        self.course = Course.from_manifest(manifest)
        if manifest["loss_rule"]:
            self.loss_rule.set_state(manifest["loss_rule"])
