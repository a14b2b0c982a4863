"""Reports of a run: records to its sinks, and log lines or a live view. Only rank 0 reports; other ranks are silent."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megadyn.config import Config
from megadyn.log import log
from megadyn.telemetry.lines import evaluation_line, tasks_line, train_line
from megadyn.telemetry.live import LiveView, open_live_view
from megadyn.telemetry.patience import PatientSink
from megadyn.telemetry.router_health import RouterHealth
from megadyn.telemetry.sinks import open_sinks
from megadyn.telemetry.slow_ranks import SlowRanks
from megadyn.telemetry.throughput import Throughput


class Silent:
    """Telemetry that does nothing, for ranks other than 0."""

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
        consumed_tokens: int,
        lm_loss: float,
        grad_norm: float,
        learning_rate: float,
        routing: dict[int, dict[str, float]],
        bad_steps: int = 0,
        rank_ms: Sequence[float] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        pass

    def evaluation(
        self, iteration: int, name: str, losses: dict[str, float], bits: dict[str, float] | None = None
    ) -> None:
        pass

    def tasks(self, iteration: int, scores: dict[str, dict[str, float]]) -> None:
        pass

    def event(self, iteration: int, name: str, what: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Telemetry(Silent):
    """Turns steps into reports. Throughput covers the steps since the last report, without evaluation and saving."""

    def __init__(
        self,
        config: Config,
        world_size: int,
        folder: Path,
        start_iteration: int,
        device_name: str | None = None,
        hosts: Sequence[str] | None = None,
    ):
        """`device_name`: of the GPU; None on a CPU. `hosts`: of each rank; None if unknown."""
        self.config = config
        self.iterations = config.last_iteration
        self.throughput = Throughput(config, world_size, device_name)
        if device_name is not None and self.throughput.peak is None:
            log.info(
                "MFU is not reported: the peak of %s in %s is unknown; set logging.peak_tflops",
                device_name,
                config.precision,
            )
        self.sinks = [PatientSink(sink) for sink in open_sinks(config, folder, start_iteration)]
        self.health = RouterHealth(config)
        self.slow_ranks = SlowRanks(
            config.logging.slow_rank_factor,
            hosts or ["an unknown host"] * world_size,
            config.parallel.pipeline,
            config.logging.interval,
        )
        self.live = open_live_view(config)
        self.restart_clock(start_iteration)

    def go_back(self, iteration: int, iterations: int) -> None:
        """Continues from `iteration` to `iterations`; later iterations reported earlier will be repeated."""
        self.iterations = iterations
        if self.live:
            self.live.iterations = iterations
        for sink in self.sinks:
            sink.go_back(iteration)
        self.health.go_back()
        self.slow_ranks.restart()
        self.restart_clock(iteration)

    def restart_clock(self, iteration: int) -> None:
        """Restarts the clock, because the time since the last step (evaluating, saving) is not training time."""
        self._reported, self._since, self._waited_s = iteration, time.perf_counter(), 0.0

    def step(self, iteration: int, waited_s: float) -> None:
        """Counts a step, in which training waited `waited_s` seconds for data."""
        self._waited_s += waited_s
        self._show(lambda live: live.step(iteration))

    def train(
        self,
        iteration: int,
        *,
        consumed_samples: int,
        consumed_tokens: int,
        lm_loss: float,
        grad_norm: float,
        learning_rate: float,
        routing: dict[int, dict[str, float]],
        bad_steps: int = 0,
        rank_ms: Sequence[float] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Reports the state after `iteration` steps; `more` is added to the record unchanged. `rank_ms`: own time of each
        rank in the last step, if it was measured."""
        steps = max(1, iteration - self._reported)
        step_s = (time.perf_counter() - self._since) / steps
        record = {
            "iteration": iteration,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_tokens,
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
            **(self.slow_ranks.figures(rank_ms) if rank_ms else {}),
        }
        self._write(record)
        seconds_left = (self.iterations - iteration) * step_s
        self._show(lambda live: live.train(record, seconds_left))
        if self.live is None:
            log.info("%s", train_line(record, self.iterations, seconds_left))
        for finding in self.health.look(iteration, routing):
            log.warning("%s", finding.sentence)
            self.event(iteration, "router_warning", finding.record())
        if rank_ms and (slow := self.slow_ranks.look(rank_ms)):
            log.warning("%s", slow.sentence)
            self.event(iteration, "slow_rank", slow.record())
        self.restart_clock(iteration)

    def evaluation(
        self, iteration: int, name: str, losses: dict[str, float], bits: dict[str, float] | None = None
    ) -> None:
        """Reports losses on the set `name` (`validation`, `validation/NAME` or `test`) by routing mode, in nats per token
        and, if given, in bits per byte."""
        self._write(
            {"iteration": iteration, name: losses if bits is None else losses | {"bits_per_byte": bits}}
        )
        log.info("%s", evaluation_line(iteration, self.iterations, name, losses, bits))
        self.restart_clock(iteration)

    def tasks(self, iteration: int, scores: dict[str, dict[str, float]]) -> None:
        """Reports scores on tasks of the checkpoint of `iteration`, an earlier one: training has gone on meanwhile."""
        phase = self.config.phase
        of_phase = {} if phase is None else {"phase": phase.name_at(iteration)}
        self._write({"iteration": iteration, **of_phase, "tasks": scores})
        log.info("%s", tasks_line(iteration, self.iterations, scores))

    def event(self, iteration: int, name: str, what: dict[str, Any]) -> None:
        """Records an event at `iteration`: a bad step, a checkpoint."""
        self._write({"iteration": iteration, name: what})

    def _write(self, record: dict[str, Any]) -> None:
        if self.config.phase is not None:
            record = {"iteration": record["iteration"], "phase": self.config.phase.name} | record
        for sink in self.sinks:
            sink.write(record)

    def _show(self, act: Callable[[LiveView], None]) -> None:
        """Updates the view. If the terminal is gone (window closed, connection lost), the run continues with log lines."""
        if self.live is None:
            return
        try:
            act(self.live)
        except OSError as error:
            view, self.live = self.live, None
            view.abandon()
            log.warning("the live view ends: %s", error)

    def close(self) -> None:
        """Closes the view and all sinks, even if one fails, and summarises the routers' problems."""
        self._show(LiveView.close)
        for sentence in self.health.summary():
            log.warning("at the end: %s", sentence)
        for sink in self.sinks:
            sink.close()


def auxiliary_losses(routing: dict[int, dict[str, float]]) -> dict[str, float]:
    """Each unweighted auxiliary loss, averaged over the layers that have it."""
    found: dict[str, list[float]] = {}
    for record in routing.values():
        for name, value in record.items():
            if name.endswith("_loss"):
                found.setdefault(name.removesuffix("_loss"), []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
