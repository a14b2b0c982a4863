"""The `logging` section of the configuration: what a run reports, where, and how often."""

from dataclasses import dataclass, field

from megadyn.checks import at_least, one_of
from megadyn.errors import ConfigError

WINDOWS = ("profile_steps", "memory_snapshot_steps")
"""Keys for steps that `profile_ranks` record."""


@dataclass
class LoggingConfig:
    interval: int = 10
    """Steps between log lines and metrics. A reported step needs two additional small all-reduces."""
    tensorboard: bool = True
    """Also write metrics as TensorBoard events, to OUTPUT_DIR/tensorboard."""
    csv: bool = False
    """Also write metrics to metrics.csv; a row is an iteration, a name and a value."""
    wandb: str = "none"
    """Weights & Biases: `none`, `online`, or `offline` (into OUTPUT_DIR/wandb, for `wandb sync` later)."""
    wandb_project: str = "megadyn"
    """Weights & Biases project for the run."""
    wandb_entity: str | None = None
    """Weights & Biases user or team (default: that of the account)."""
    live: str = "auto"
    """A self-refreshing view instead of one log line per report: `auto` (if standard output is a terminal), `always` or
    `never`. Output of other ranks to the same terminal disturbs it until the next refresh."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for MFU. Known for common devices (`planning/devices.py`) in 16-bit precision. If
    unknown and not given, MFU is not reported."""
    slow_rank_factor: float = 1.5
    """A rank is named as slow, with its host, if its own part of a step (without waiting for others) takes longer than this
    multiple of the median of its pipeline stage in successive reports, at least two and over at least 5 steps; 0 names
    nobody. Lower it on GPUs whose ranks are otherwise even."""
    profile_steps: list[int] | None = None
    """[first, last] step of a torch.profiler trace, written to OUTPUT_DIR/profile."""
    memory_snapshot_steps: list[int] | None = None
    """[first, last] step of a history of the GPU's memory, written to OUTPUT_DIR/memory for https://pytorch.org/memory_viz: each
    allocation and the line that made it. A run that ends in between, out of memory, keeps what there is. For GPUs only."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write traces and histories of memory."""

    def check(self) -> None:
        at_least("logging.interval", self.interval, 1)
        one_of("logging.wandb", self.wandb, ("none", "online", "offline"))
        one_of("logging.live", self.live, ("auto", "always", "never"))
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float("inf"):
            raise ConfigError("logging.peak_tflops", self.peak_tflops, "a finite number above 0")
        at_least("logging.slow_rank_factor", self.slow_rank_factor, 0)
        if 0 < self.slow_rank_factor <= 1:
            raise ConfigError("logging.slow_rank_factor", self.slow_rank_factor, "above 1, or 0 for no rule")
        for name in WINDOWS:
            steps = getattr(self, name)
            if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
                raise ConfigError(f"logging.{name}", steps, "[first, last], with 1 <= first <= last")
        ranks = self.profile_ranks
        if not ranks or min(ranks) < 0 or len(set(ranks)) < len(ranks):
            raise ConfigError("logging.profile_ranks", ranks, "at least one rank, each once")
