"""A trace of some steps on some ranks, for chrome://tracing, Perfetto or TensorBoard."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megadyn.config.logging import LoggingConfig
from megadyn.log import log


class Profile:
    """Runs torch.profiler for the steps `logging.profile_steps` on the ranks `logging.profile_ranks`; does nothing if
    these are unset.

    If the run ends inside the window, the trace so far is kept. Steps repeated after a rollback are not traced twice.
    """

    def __init__(self, config: LoggingConfig, folder: Path, rank: int, start_iteration: int):
        self.first, self.last = config.profile_steps or (0, 0)
        self.folder, self.rank = folder / "profile", rank
        self.is_due = config.profile_steps is not None and rank in config.profile_ranks
        if self.is_due and start_iteration >= self.last:
            log.warning(
                "no steps are traced: the run continues from iteration %d, after logging.profile_steps = [%d, %d]",
                start_iteration,
                self.first,
                self.last,
            )
            self.is_due = False
        self._running: profile | None = None
        self._began = 0

    def before_step(self, number: int) -> None:
        if self.is_due and self.first <= number <= self.last:
            self.is_due, self._began = False, number
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profile(activities=activities)
            self._running.start()

    def after_step(self, number: int) -> bool:
        """Returns whether the window ended here, so that some rank spent time on writing a trace."""
        if self._running is not None and number >= self.last:
            self.finish(number)
        return number == self.last

    def finish(self, number: int) -> None:
        """Writes the trace, if one is running, atomically. A full disk does not stop the run."""
        if self._running is None:
            return
        trace, self._running = self._running, None
        trace.stop()
        path = self.folder / f"rank{self.rank}-steps{self._began}-{number}.json.gz"
        temporary = path.with_name(f".{path.name.removesuffix('.json.gz')}.tmp.json.gz")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            log.warning("%s: the trace was not written: %s", path, error)
            return
        log.info("traced steps %d to %d: %s", self._began, number, path)
