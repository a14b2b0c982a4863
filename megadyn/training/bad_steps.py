"""What a run does after a bad step (`training.on_bad_step`): stop, skip it, or go back. A bad step never reaches the weights."""

from megadyn.config import TrainingConfig
from megadyn.engine.engine import StepResult
from megadyn.log import log
from megadyn.telemetry.telemetry import Silent
from megadyn.training.checkpoints import Checkpoints
from megadyn.training.loss_rule import TrainingDiverged
from megadyn.training.state import RunState


class BadSteps:
    """Handles the bad steps of a run. Every method is collective."""

    def __init__(self, config: TrainingConfig, state: RunState, checkpoints: Checkpoints, telemetry: Silent):
        self.config, self.state, self.checkpoints, self.telemetry = config, state, checkpoints, telemetry

    def take(self, result: StepResult) -> None:
        """Handles the bad step `state.iteration`: continues, or raises TrainingDiverged."""
        state, at, loss = self.state, self.state.iteration, float(result.loss)
        state.loss_rule.note_bad(at, loss)
        said = f"step {at} ({self._samples()}) is bad: {result.problem}"
        self._go_on(said)
        if self.config.on_bad_step == "rollback":
            self.telemetry.go_back(state.iteration, state.config.last_iteration)
        self.telemetry.event(
            state.iteration,
            "bad_step",
            {
                "iteration": at,
                "problem": result.problem,
                "action": self.config.on_bad_step,
                "lm_loss": loss,
                "consumed_samples": state.consumed_samples,
                "bad_steps": state.loss_rule.bad_steps,
            },
        )

    def _go_on(self, said: str) -> None:
        state, action = self.state, self.config.on_bad_step
        kept = f"the step was not applied, and nothing was saved since iteration {max(0, state.saved_at)}"
        if action == "stop":
            raise TrainingDiverged(f"{said}; {kept} (training.on_bad_step: skip or rollback continues)")
        if excess := state.loss_rule.excess():
            raise TrainingDiverged(f"{said}, and it makes {excess}; {kept}")
        done = "skipped"
        if action == "rollback":
            if not self.checkpoints.go_back():
                raise TrainingDiverged(f"{said}, and there is no good checkpoint to go back to; {kept}")
            done = f"back to iteration {state.iteration}, continuing with the samples after it"
        log.warning("%s; %s (%d bad steps so far)", said, done, state.loss_rule.bad_steps)

    def _samples(self) -> str:
        """The samples of the bad step."""
        consumed = self.state.consumed_samples
        return f"samples {consumed - self.config.global_batch_size} to {consumed - 1}"
