"""The section `training.anneal`: a routing capacity that moves in levels to the one of `model.routing`."""

from dataclasses import dataclass

from megadyn.checks import at_least, in_range
from megadyn.errors import ConfigError

LEVELS = 8


@dataclass
class AnnealConfig:
    """The capacity moves in levels of equal length, because each level has tensors of its own shapes."""

    capacity: float | None = None
    """Capacity of the routing in the first steps, from which it moves in equal levels to `model.routing.capacity`; null: it is
    constant. 1 begins with all tokens in all layers. For kinds of routing whose capacity sets what their layers take."""
    iterations: int | None = None
    """Steps over all levels. The steps after them have `model.routing.capacity`."""
    levels: int = LEVELS
    """Number of capacities before the last one. Each level ends with an evaluation and a checkpoint, and restarts the engine;
    use few for a large model."""

    def check(self) -> None:
        at_least("training.anneal.levels", self.levels, 1)
        if self.capacity is None:
            for name, default in (("iterations", None), ("levels", LEVELS)):
                if (value := getattr(self, name)) != default:
                    raise ConfigError(
                        f"training.anneal.{name}", value, "left out without training.anneal.capacity"
                    )
            return
        in_range("training.anneal.capacity", self.capacity, 0, 1)
        if self.iterations is None:
            raise ConfigError("training.anneal.iterations", None, "given with training.anneal.capacity")
        at_least("training.anneal.iterations", self.iterations, 1)
        if self.levels > self.iterations:
            raise ConfigError(
                "training.anneal.levels",
                self.levels,
                f"at most training.anneal.iterations = {self.iterations}: each level needs a step",
            )

    def stages(self, target: float, steps: int) -> list[tuple[float, int]]:
        """Capacity and number of steps of each level, and last of what is left at the capacity `target`.

        Args:
            steps: all steps of the run or phase.

        Raises:
            ConfigError: the levels do not fit, or there is nothing to change.
        """
        assert self.capacity is not None and self.iterations is not None, "checked"
        if self.capacity == target:
            raise ConfigError(
                "training.anneal.capacity", self.capacity, "different from model.routing.capacity"
            )
        if self.iterations >= steps:
            raise ConfigError(
                "training.anneal.iterations",
                self.iterations,
                f"less than the {steps} steps, so that the last ones have model.routing.capacity = {target}",
            )
        found, begin = [], 0
        for place in range(self.levels):
            end = self.iterations * (place + 1) // self.levels
            capacity = self.capacity + (target - self.capacity) * place / self.levels
            found.append((round(capacity, 6), end - begin))
            begin = end
        return [*found, (target, steps - self.iterations)]
