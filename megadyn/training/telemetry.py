"""What a run reports: a line in the log, a line in metrics.jsonl, TensorBoard. Rank 0 only."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from megadyn.config import Config
from megadyn.log import log
from megadyn.planning.flops import training_flops


class Telemetry:
    """Turns steps into reports. Throughput is over the steps since the last report, evaluation and saving left out."""

    def __init__(self, config: Config, world_size: int, folder: Path, start_iteration: int):
        self.config, self.folder = config, folder
        training = config.training
        self.iterations = training.iterations or 0
        self.tokens_per_step = training.tokens_per_step
        flops = training_flops(config.model, training.sequence_length) * training.global_batch_size
        self.tflops_per_step = flops / world_size / 1e12
        self.file: TextIO | None = None
        self.board: Any = None
        self.go_back(start_iteration)

    def go_back(self, iteration: int) -> None:
        """Goes on from `iteration`: what was reported of later ones will be done again."""
        if self.file is not None:
            self.close()
        keep_lines_until(self.folder / "metrics.jsonl", iteration)
        self.file = (self.folder / "metrics.jsonl").open("a")
        if self.config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds of imports: only where it is asked for

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=iteration + 1)
        self.restart_clock(iteration)

    def restart_clock(self, iteration: int) -> None:
        """Measures anew from here: what was done since the last step (evaluating, saving) is not training time."""
        self._reported, self._since, self._waited_s = iteration, time.perf_counter(), 0.0

    def add_wait(self, seconds: float) -> None:
        """Counts time of a step in which training waited for its data."""
        self._waited_s += seconds

    def train(self, iteration: int, *, consumed_samples: int, lm_loss: float, grad_norm: float, learning_rate: float,
              routing: dict[int, dict[str, float]], bad_steps: int = 0) -> None:
        """Reports the state after `iteration` steps."""
        steps = max(1, iteration - self._reported)
        step_time = (time.perf_counter() - self._since) / steps
        record = {
            "iteration": iteration, "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * self.config.training.sequence_length,
            "lm_loss": lm_loss, "aux_losses": auxiliary_losses(routing), "grad_norm": grad_norm,
            "learning_rate": learning_rate, "step_time_ms": step_time * 1e3,
            "data_time_ms": self._waited_s / steps * 1e3,
            "tokens_per_second": self.tokens_per_step / step_time, "model_tflops": self.tflops_per_step / step_time,
            "routing": {str(layer): routing[layer] for layer in sorted(routing)}, "bad_steps": bad_steps,
        }
        self._write(record)
        log.info("%s", train_line(record, self.iterations, (self.iterations - iteration) * step_time))
        self.restart_clock(iteration)

    def evaluation(self, iteration: int, name: str, losses: dict[str, float]) -> None:
        """Losses on the set `name`, `validation` or `test`, by routing."""
        self._write({"iteration": iteration, name: losses})
        shown = "  ".join(f"{mode} {loss:.4f}" for mode, loss in losses.items())
        log.info("%s", f"{progress(iteration, self.iterations)}  {name} loss  {shown}")
        self.restart_clock(iteration)

    def event(self, iteration: int, name: str, what: dict[str, Any]) -> None:
        """What happened when the run stood at `iteration`: a bad step, a checkpoint."""
        self._write({"iteration": iteration, name: what})

    def _write(self, record: dict[str, Any]) -> None:
        """A full disk stops no run: the line is kept back until there is room, and the log says so."""
        assert self.file is not None
        try:
            print(json.dumps(finite(record), allow_nan=False), file=self.file, flush=True)
            if self.board is not None:
                for name, value in flat_scalars(record):
                    self.board.add_scalar(name, value, record["iteration"])
        except OSError as error:
            log.warning("metrics of iteration %d not written yet: %s", record["iteration"], error)

    def close(self) -> None:
        assert self.file is not None
        try:
            self.file.close()
            if self.board is not None:
                self.board.close()
        except OSError as error:
            log.warning("the last metrics were not written: %s", error)


def auxiliary_losses(routing: dict[int, dict[str, float]]) -> dict[str, float]:
    """Each auxiliary loss, averaged over the layers that have it, unweighted."""
    found: dict[str, list[float]] = {}
    for record in routing.values():
        for name, value in record.items():
            if name.endswith("_loss"):
                found.setdefault(name.removesuffix("_loss"), []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def train_line(record: dict[str, Any], iterations: int, seconds_left: float) -> str:
    """One line that fits 100 columns."""
    parts = [progress(record["iteration"], iterations), f"loss {record['lm_loss']:.4f}"]
    parts += [f"{name} {value:.2g}" for name, value in record["aux_losses"].items()]
    norm = record["grad_norm"]
    parts.append(f"grad {norm:.2f}" if norm < 10 else f"grad {norm:.3g}")
    routed = [layer["routed_fraction"] for layer in record["routing"].values() if "routed_fraction" in layer]
    if routed:
        parts.append(f"routed {sum(routed) / len(routed):.0%}")
    parts += [f"{short(record['tokens_per_second'])} tok/s", f"{record['model_tflops']:.3g} TFLOP/s",
              f"left {duration(seconds_left)}"]
    return "  ".join(parts)


def progress(iteration: int, iterations: int) -> str:
    """`  120/50000`, as wide in every line of a run."""
    return f"{iteration:>{len(str(iterations))}d}/{iterations}"


def short(count: float) -> str:
    """`3,457`, `45.7k`, `1.23M`: three figures or more."""
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1e3:.3g}k" if count < 999_500 else f"{count / 1e6:.3g}M"


def duration(seconds: float) -> str:
    """`3d04h`, `2h05m`, `4m07s`, `9s`: the two largest units."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d{h:02d}h" if days else f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def finite(value: Any) -> Any:
    """`value` with null for what JSON has no number for: fp16's gradient norm in a step that overflowed."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat_scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """`a/b/c` names and values of all numbers in a metrics record but its iteration."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += flat_scalars(value, f"{prefix}{key}/")
        elif key != "iteration" and isinstance(value, (int, float)):
            found.append((prefix + key, value))
    return found


def keep_lines_until(path: Path, iteration: int) -> None:
    """Drops the lines of steps that a resumed run will do again, and a half-written last line; all, for a run that begins."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if iteration and json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except ValueError:
            log.warning("%s: a half-written line was dropped", path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)

