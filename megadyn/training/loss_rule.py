"""Which losses count as bad, and when a run must stop because of them."""

import math
import statistics
from collections import deque
from typing import Any

from megadyn.config import TrainingConfig
from megadyn.errors import RunError


class TrainingDiverged(RunError):
    """A step was bad and the run must not continue. The step did not reach the weights; the last checkpoint is intact."""

    is_everywhere = True


class LossRule:
    """Detects bad losses: NaN, infinite, or a spike above the median of recent good steps; and says how large a gradient norm
    may be. Also counts bad steps. Equal on all ranks; saved in every checkpoint."""

    def __init__(self, config: TrainingConfig):
        self.factor, self.window = config.spike_factor, config.spike_window
        self.most_in_a_row, self.most = config.max_bad_steps, config.max_bad_steps_total
        self.recent: deque[float] = deque(maxlen=self.window)
        self.norm_factor = config.norm_spike_factor
        self.norm_average, self.norms = 0.0, 0
        """Moving average of good steps' gradient norms, from 0 on, and their number; equal on all ranks up to rounding."""
        self.bad_steps = 0
        """In the whole run."""
        self.in_a_row = 0
        """Bad steps since the last progress, that is, since the last good step beyond all bad ones."""
        self.last_bad = 0
        """The highest iteration with a bad step."""
        self.last_was_bad = False
        """Whether the last step was bad; a checkpoint saved now does not count as good."""
        self.last_loss = 0.0

    @property
    def limit(self) -> float:
        """The highest good loss; infinite until `spike_window` good steps have been seen, or without a spike rule."""
        if not self.factor or len(self.recent) < self.window:
            return math.inf
        return self.factor * statistics.median(self.recent)

    @property
    def norm_limit(self) -> float:
        """The highest good gradient norm, a multiple of the average without the share of its start at 0; infinite as `limit`."""
        if not self.norm_factor or self.norms < self.window:
            return math.inf
        return self.norm_factor * self.norm_average / (1 - (1 - 1 / self.window) ** self.norms)

    @property
    def limits(self) -> tuple[float, float]:
        """Of the next step's loss and gradient norm."""
        return self.limit, self.norm_limit

    def note(self, iteration: int, loss: float, norm: float = 0.0) -> None:
        """Records a good step."""
        self.recent.append(loss)
        if self.norm_factor and math.isfinite(norm):
            self.norm_average += (norm - self.norm_average) / self.window
            self.norms += 1
        self.last_was_bad, self.last_loss = False, loss
        if iteration > self.last_bad:  # after a rollback, steps up to the bad one are no progress
            self.in_a_row = 0

    def note_bad(self, iteration: int, loss: float) -> None:
        self.bad_steps += 1
        self.in_a_row += 1
        self.last_bad = max(self.last_bad, iteration)
        self.last_was_bad, self.last_loss = True, loss

    def excess(self) -> str | None:
        """Which limit the bad steps exceed, as a phrase that follows "it makes"; None while the run may continue."""
        if self.in_a_row > self.most_in_a_row:
            return f"{self.in_a_row} in a row, more than training.max_bad_steps = {self.most_in_a_row}"
        if self.bad_steps > self.most:
            return f"{self.bad_steps} of the run, more than training.max_bad_steps_total = {self.most}"
        return None

    def state(self) -> dict[str, Any]:
        return {
            "recent_losses": list(self.recent),
            "norm_average": self.norm_average,
            "norms": self.norms,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.in_a_row,
            "last_bad": self.last_bad,
            "last_was_bad": self.last_was_bad,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Counts only rise: going back does not undo bad steps."""
        self.recent = deque(state["recent_losses"], maxlen=self.window)
        self.norm_average, self.norms = state.get("norm_average", 0.0), state.get("norms", 0)
        self.bad_steps = max(self.bad_steps, state["bad_steps"])
        self.in_a_row = max(self.in_a_row, state.get("bad_in_a_row", 0))
        self.last_bad = max(self.last_bad, state.get("last_bad", 0))
        self.last_was_bad = state.get("last_was_bad", False)


def problem_at_end(evaluations: dict[str, dict[str, float]], last_loss: float) -> str | None:
    """Why the model of a complete run is unusable (NaN or infinite losses); None if it is fine.

    Args:
        evaluations: losses by set and routing mode. last_loss: of the last step; used only if nothing was evaluated.
    """
    for name, losses in evaluations.items():
        for mode, loss in losses.items():
            if not math.isfinite(loss):
                return f"the {name} loss ({mode}) is {loss} at the end of the run"
    if not evaluations and not math.isfinite(last_loss):
        return f"the loss of the last step is {last_loss}"
    return None
