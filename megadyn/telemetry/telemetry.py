"""What a run reports: records to its sinks, and a line in the log or a live view. Rank 0's alone; the others' is silent."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megadyn.config import Config
from megadyn.log import log
from megadyn.telemetry.lines import evaluation_line, train_line
from megadyn.telemetry.live import LiveView, open_live_view
from megadyn.telemetry.patience import PatientSink
from megadyn.telemetry.router_health import RouterHealth
from megadyn.telemetry.sinks import open_sinks
from megadyn.telemetry.throughput import Throughput


class Silent:
    """Telemetry that tells nothing: of ranks other than 0."""

    def go_back(self, iteration: int, iterations: int) -> None:
        pass

    def restart_clock(self, iteration: int) -> None:
        pass

    def step(self, iteration: int, waited_s: float) -> None:
        pass

    def train(
        self,
        iteration: int,
        *,
        consumed_samples: int,
        lm_loss: float,
        grad_norm: float,
        learning_rate: float,
        routing: dict[int, dict[str, float]],
        bad_steps: int = 0,
        more: dict[str, Any] | None = None,
    ) -> None:
        pass

    def evaluation(self, iteration: int, name: str, losses: dict[str, float]) -> None:
        pass

    def event(self, iteration: int, name: str, what: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Telemetry(Silent):
    """Turns steps into reports. Throughput is over the steps since the last report, evaluation and saving left out."""

    def __init__(
        self,
        config: Config,
        world_size: int,
        folder: Path,
        start_iteration: int,
        device_name: str | None = None,
    ):
        """`device_name`: a GPU's, None on a CPU."""
        self.config = config
        self.iterations = config.training.iterations or 0
        self.throughput = Throughput(config, world_size, device_name)
        if device_name is not None and self.throughput.peak is None:
            log.info(
                "MFU is not reported: the peak of %s in %s is unknown; set logging.peak_tflops",
                device_name,
                config.precision,
            )
        self.sinks = [PatientSink(sink) for sink in open_sinks(config, folder, start_iteration)]
        self.health = RouterHealth(config)
        self.live = open_live_view(config)
        self.restart_clock(start_iteration)

    def go_back(self, iteration: int, iterations: int) -> None:
        """Goes on from `iteration` to `iterations`: what was reported of later ones will be done again."""
        self.iterations = iterations
        if self.live:
            self.live.iterations = iterations
        for sink in self.sinks:
            sink.go_back(iteration)
        self.health.go_back()
        self.restart_clock(iteration)

    def restart_clock(self, iteration: int) -> None:
        """Measures anew from here: what was done since the last step (evaluating, saving) is not training time."""
        self._reported, self._since, self._waited_s = iteration, time.perf_counter(), 0.0

    def step(self, iteration: int, waited_s: float) -> None:
        """Counts a step, in which training waited for its data for so long."""
        self._waited_s += waited_s
        self._show(lambda live: live.step(iteration))

    def train(
        self,
        iteration: int,
        *,
        consumed_samples: int,
        lm_loss: float,
        grad_norm: float,
        learning_rate: float,
        routing: dict[int, dict[str, float]],
        bad_steps: int = 0,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Reports the state after `iteration` steps; `more` goes into the record as it is."""
        steps = max(1, iteration - self._reported)
        step_s = (time.perf_counter() - self._since) / steps
        record = {
            "iteration": iteration,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * self.config.training.sequence_length,
            "lm_loss": lm_loss,
            "aux_losses": auxiliary_losses(routing),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "step_time_ms": step_s * 1e3,
            "data_time_ms": self._waited_s / steps * 1e3,
            **self.throughput.rates(step_s, routing),
            "routing": {str(layer): routing[layer] for layer in sorted(routing)},
            "bad_steps": bad_steps,
            **(more or {}),
        }
        self._write(record)
        seconds_left = (self.iterations - iteration) * step_s
        self._show(lambda live: live.train(record, seconds_left))
        if self.live is None:
            log.info("%s", train_line(record, self.iterations, seconds_left))
        for finding in self.health.look(iteration, routing):
            log.warning("%s", finding.sentence)
            self.event(iteration, "router_warning", finding.record())
        self.restart_clock(iteration)

    def evaluation(self, iteration: int, name: str, losses: dict[str, float]) -> None:
        """Losses on the set `name`, `validation` or `test`, by routing."""
        self._write({"iteration": iteration, name: losses})
        log.info("%s", evaluation_line(iteration, self.iterations, name, losses))
        self.restart_clock(iteration)

    def event(self, iteration: int, name: str, what: dict[str, Any]) -> None:
        """What happened when the run stood at `iteration`: a bad step, a checkpoint."""
        self._write({"iteration": iteration, name: what})

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _show(self, act: Callable[[LiveView], None]) -> None:
        """A terminal that is gone (its window closed, its connection lost) stops no run: log lines follow."""
        if self.live is None:
            return
        try:
            act(self.live)
        except OSError as error:
            view, self.live = self.live, None
            view.abandon()
            log.warning("the live view ends: %s", error)

    def close(self) -> None:
        """Ends the view and the sinks, whatever one of them does, and sums up what was wrong with routers."""
        self._show(LiveView.close)
        for sentence in self.health.summary():
            log.warning("at the end: %s", sentence)
        for sink in self.sinks:
            sink.close()


def auxiliary_losses(routing: dict[int, dict[str, float]]) -> dict[str, float]:
    """Each auxiliary loss, averaged over the layers that have it, unweighted."""
    found: dict[str, list[float]] = {}
    for record in routing.values():
        for name, value in record.items():
            if name.endswith("_loss"):
                found.setdefault(name.removesuffix("_loss"), []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
