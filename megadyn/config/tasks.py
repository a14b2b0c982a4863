"""The section `training.tasks`: which tasks of lm_eval a run's checkpoints are evaluated on, and how."""

import re
from dataclasses import dataclass, field, fields

from megadyn.checks import at_least
from megadyn.errors import ConfigError
from megadyn.paths import expanded


@dataclass
class TasksConfig:
    """Tasks of lm_eval, on which a process of its own evaluates checkpoints while training goes on."""

    names: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm_eval by name, and files or folders with tasks of your own: an entry with `/` or `.yaml` is a
    path. Rank 0 evaluates checkpoints on them, routed causally, in a process beside training. Needs `lm_eval`."""
    interval: int = 0
    """Steps between evaluations on tasks, a multiple of `checkpoint.interval`; 0 evaluates only the last checkpoint of the run,
    which is evaluated in any case."""
    device: str = "cpu"
    """Where the tasks run: `cpu`, `cuda`, or `cuda:N` as rank 0 counts the GPUs that it sees. On a GPU that also trains, both
    share memory and time."""
    threads: int = 4
    """CPU threads of the evaluation. On a CPU it yields to the ranks where both want the same cores."""
    batch_size: int = 8
    """Rows that the evaluation computes at once. Under causal routing it does not change the scores."""
    limit: int | None = None
    """Only the first so many questions of each task; null: all."""
    num_fewshot: int | None = None
    """Examples before each question; null: as each task says. Tasks that fix it to 0 keep that."""
    wait_s: float = 1800.0
    """How long the end of a run waits for its last evaluation. A run that was told to stop does not wait; what it interrupts is
    evaluated after the next start."""

    def check(self) -> None:
        if not self.names:
            for one in fields(self):
                if one.name != "names" and (value := getattr(self, one.name)) != one.default:
                    raise ConfigError(
                        f"training.tasks.{one.name}", value, "left out without training.tasks.names"
                    )
            return
        for name in self.names:
            if not name.strip() or "," in name or self.names.count(name) > 1:
                raise ConfigError(
                    "training.tasks.names", self.names, "a list of names or paths, each once, without commas"
                )
        self.names = [
            expanded(name, "training.tasks.names") if is_path(name) else name for name in self.names
        ]
        at_least("training.tasks.interval", self.interval, 0)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError("training.tasks.device", self.device, "cpu, cuda or cuda:N")
        for name in ("threads", "batch_size", "limit"):
            at_least(f"training.tasks.{name}", getattr(self, name), 1)
        at_least("training.tasks.num_fewshot", self.num_fewshot, 0)
        at_least("training.tasks.wait_s", self.wait_s, 0)

    def check_interval(self, checkpoints: int) -> None:
        """Whether there is a checkpoint at each multiple of `interval`. `checkpoints`: steps between them."""
        if self.interval and (not checkpoints or self.interval % checkpoints):
            raise ConfigError(
                "training.tasks.interval",
                self.interval,
                f"a multiple of checkpoint.interval = {checkpoints}, which must be above 0: checkpoints are evaluated",
            )


def is_path(name: str) -> bool:
    """Whether an entry of `names` is a file or folder."""
    return "/" in name or name.endswith((".yaml", ".yml"))
