"""Where a configuration stands in a run of several phases."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One phase of a run, for the configuration that it comes to."""

    name: str
    number: int
    """Counted from 1."""
    count: int
    """Number of phases of the run."""
    begin: int
    """Iteration at which it begins, the end of the one before."""
    end: int
    total: int
    """Iteration at which the run ends."""
    samples: int
    """Samples that the run has consumed when it begins, if no step was undone."""
    batch: int
    """Samples per step."""
    changes: dict[str, Any]
    """The keys that it names, by their dotted names."""
    passed: list[list[Any]]
    """Name, end, samples per step and tokens per sample of each phase up to this one, for the manifest."""

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    @property
    def samples_at_end(self) -> int:
        return self.samples + (self.end - self.begin) * self.batch

    def name_at(self, iteration: int) -> str:
        """The name of the phase, this or an earlier one, whose step `iteration` is."""
        return next((str(name) for name, end, *_ in self.passed if iteration <= end), self.name)

    def __str__(self) -> str:
        return f"phase {self.number} of {self.count}, {self.name}"
