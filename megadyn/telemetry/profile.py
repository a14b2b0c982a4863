"""What some ranks record during a window of steps: a trace, for chrome://tracing, Perfetto or TensorBoard, and the history of a
GPU's memory, for https://pytorch.org/memory_viz."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megadyn.config.logging import LoggingConfig
from megadyn.log import log


class Window(ABC):
    """Records the steps `logging.<key>` on the ranks `logging.profile_ranks`; does nothing if these are unset.

    If the run ends inside the window, what there is so far is kept. Steps repeated after a rollback are not recorded twice.
    """

    key: str
    what: str
    """What is written, in words."""
    verb: str
    suffix: str

    def __init__(self, config: LoggingConfig, folder: Path, rank: int, start_iteration: int):
        """`folder`: where files go."""
        steps: Sequence[int] | None = getattr(config, self.key)
        self.first, self.last = steps or (0, 0)
        self.folder, self.rank = folder, rank
        self.is_due = steps is not None and rank in config.profile_ranks
        if self.is_due and start_iteration >= self.last:
            log.warning(
                "no steps are %s: the run continues from iteration %d, after logging.%s = [%d, %d]",
                self.verb,
                start_iteration,
                self.key,
                self.first,
                self.last,
            )
            self.is_due = False
        self.is_running, self._began = False, 0

    @abstractmethod
    def begin(self) -> None:
        """Starts recording."""

    @abstractmethod
    def stop(self) -> None:
        """Stops recording, where what was recorded remains."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """Writes what was recorded."""

    @abstractmethod
    def drop(self) -> None:
        """Lets go of what was recorded, written or not."""

    def before_step(self, number: int) -> None:
        if self.is_due and self.first <= number <= self.last:
            self.is_due, self.is_running, self._began = False, True, number
            self.begin()

    def after_step(self, number: int) -> bool:
        """Returns whether the window ended here, so that some rank spent time on writing."""
        if self.is_running and number >= self.last:
            self.finish(number)
        return number == self.last

    def finish(self, number: int) -> None:
        """Writes what is recorded, if anything, atomically. A full disk does not stop the run."""
        if not self.is_running:
            return
        self.is_running = False
        self.stop()
        path = self.folder / f"rank{self.rank}-steps{self._began}-{number}{self.suffix}"
        temporary = path.with_name(f".{path.name.removesuffix(self.suffix)}.tmp{self.suffix}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            log.warning("%s: the %s was not written: %s", path, self.what, error)
            return
        finally:
            self.drop()
        log.info("%s steps %d to %d: %s", self.verb, self._began, number, path)


class Profile(Window):
    """torch.profiler's trace, in the folder `profile` of the run."""

    key, what, verb, suffix = "profile_steps", "trace", "traced", ".json.gz"

    def __init__(self, config: LoggingConfig, folder: Path, rank: int, start_iteration: int):
        super().__init__(config, folder / "profile", rank, start_iteration)
        self._trace: profile | None = None

    def begin(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._trace = profile(activities=activities)
        self._trace.start()

    def stop(self) -> None:
        assert self._trace is not None
        self._trace.stop()

    def write(self, path: Path) -> None:
        assert self._trace is not None
        self._trace.export_chrome_trace(str(path))

    def drop(self) -> None:
        self._trace = None


class MemorySnapshot(Window):
    """Every allocation on this rank's GPU, with the line of Python that made it, in the folder `memory` of the run."""

    key, what, verb, suffix = (
        "memory_snapshot_steps",
        "memory snapshot",
        "recorded with their memory",
        ".pickle",
    )

    def __init__(self, config: LoggingConfig, folder: Path, rank: int, start_iteration: int):
        super().__init__(config, folder / "memory", rank, start_iteration)

    def begin(self) -> None:
        torch.cuda.memory._record_memory_history(stacks="python")  # those of C++ take minutes to look up

    def stop(self) -> None:
        """Nothing: `drop` stops it, after which torch has forgotten the history."""

    def write(self, path: Path) -> None:
        torch.cuda.memory._dump_snapshot(str(path))

    def drop(self) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)


class Windows:
    """All that records a window of steps."""

    def __init__(self, config: LoggingConfig, folder: Path, rank: int, start_iteration: int):
        """`folder`: of the run."""
        self._each = [kind(config, folder, rank, start_iteration) for kind in (Profile, MemorySnapshot)]

    def before_step(self, number: int) -> None:
        for window in self._each:
            window.before_step(number)

    def after_step(self, number: int) -> bool:
        """Returns whether a window ended here, so that some rank spent time on writing."""
        ended = [window.after_step(number) for window in self._each]  # every one must see the step
        return any(ended)

    def finish(self, number: int) -> None:
        for window in self._each:
            window.finish(number)
