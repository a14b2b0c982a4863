"""Evaluates a run's checkpoints on tasks of lm_eval (`training.tasks`) while it trains.

Rank 0 starts a process for a complete checkpoint and looks between steps whether it has ended; no rank waits before the end of
the run. There is one process at a time. Meanwhile one checkpoint waits, the newest; an older one that still waits is left out,
which the log says.

    OUTPUT_DIR/tasks/
      iteration-00000100.json    all that lm_eval found; with the digest of the checkpoint's manifest
      iteration-00000100.log     what the process printed

A file `being-evaluated` marks a checkpoint from when it is asked for until its results are in the metrics. It is not removed
before, and the next start takes up what is marked. So each checkpoint is evaluated once, also where a run was killed.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

import torch.distributed as dist

from megadyn.checkpoint import layout
from megadyn.checkpoint.mirror import digest_of
from megadyn.config import Config
from megadyn.errors import UserError
from megadyn.files import read_json
from megadyn.launch.watchdog import Watchdog
from megadyn.log import log
from megadyn.parallel.objects import all_gather
from megadyn.progress import duration
from megadyn.telemetry.telemetry import Silent
from megadyn.training import task_process
from megadyn.training.mirroring import ASKS_S

FOLDER = "tasks"


class Running(NamedTuple):
    checkpoint: Path
    digest: str
    process: "Popen[bytes]"


class Tasks:
    """The evaluations of a run on tasks. Every rank has one; only rank 0's does something, if the run asks for tasks."""

    def __init__(self, config: Config, watchdog: Watchdog) -> None:
        self.settings, self.watchdog = config.training.tasks, watchdog
        self.keep, self.keep_every = config.checkpoint.keep, config.checkpoint.keep_every
        self.root = Path(config.output_dir) / layout.CHECKPOINTS
        self.folder = Path(config.output_dir) / FOLDER
        self.is_wanted = bool(self.settings.names)
        self.is_first = dist.get_rank() == 0
        self.telemetry = Silent()  # of the part that is being trained
        self._running: Running | None = None
        self._waiting: Path | None = None
        self._ended: list[Path] = []  # with results that are not in the metrics
        self._events: list[tuple[int, str, dict[str, Any]]] = []  # that are not in the metrics

    # ---- what the loop calls ---------------------------------------------------------------------

    def saved(self, checkpoint: Path, is_last: bool) -> None:
        """Evaluates the complete `checkpoint` if that is due. `is_last`: of the run."""
        if self.is_wanted and self.is_first and self._is_due(checkpoint, is_last):
            self._ask(checkpoint)

    def collect(self) -> None:
        """Reports results that are there, and starts what waits. Takes no time unless something has ended."""
        self._say_events()
        while self._ended:
            self._report(self._ended.pop(0))
        if self._running is None or self._running.process.poll() is None:
            return
        (checkpoint, digest, process), self._running = self._running, None
        if process.returncode or self._results(checkpoint, digest) is None:
            said = task_process.log_beside(self._file(checkpoint))
            self._failed(checkpoint, f"{self._problem(said, process.returncode)}; {said} has all of it")
        else:
            self._report(checkpoint)
        self._start_waiting()

    def go_back(self, iteration: int) -> None:
        """Leaves out checkpoints after `iteration`, from which the run goes on another way."""
        running = self._running
        if running is not None and layout.iteration_of(running.checkpoint) > iteration:
            task_process.stop(running.process, self._file(running.checkpoint))
            self._running = None
            self._leave_out(running.checkpoint, "the run has gone back")
        if self._waiting is not None and layout.iteration_of(self._waiting) > iteration:
            self._leave_out(self._waiting, "the run has gone back")
            self._waiting = None
        if self._running is None:
            self._start_waiting()

    def _is_due(self, checkpoint: Path, is_last: bool) -> bool:
        interval = self.settings.interval
        return is_last or (interval > 0 and layout.iteration_of(checkpoint) % interval == 0)

    def _ask(self, checkpoint: Path) -> None:
        if self._running is None:
            self._start(checkpoint)
            return
        if self._waiting is not None:
            self._leave_out(self._waiting, "an evaluation takes longer than training.tasks.interval")
        self._waiting = checkpoint
        self._guarded(checkpoint, (checkpoint / layout.EVALUATED).touch)
        log.info("%s waits for its evaluation until that of %s ends", checkpoint, self._running.checkpoint)

    def _start_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._start(waiting)

    def _start(self, checkpoint: Path) -> None:
        def start() -> None:
            (checkpoint / layout.EVALUATED).touch()
            self.folder.mkdir(parents=True, exist_ok=True)
            digest, output = digest_of(checkpoint), self._file(checkpoint)
            process = task_process.start(self.settings, checkpoint, digest, output)
            self._running = Running(checkpoint, digest, process)

        if self._guarded(checkpoint, start):
            log.info("evaluating %s on tasks, on %s", checkpoint, self.settings.device)

    def _guarded(self, checkpoint: Path, do: Callable[[], None]) -> bool:
        """Whether `do` has succeeded. A failure of the disk here must not end the run."""
        try:
            do()
        except OSError as error:
            self._failed(checkpoint, f"{error.filename or checkpoint}: {error.strerror or error}")
            return False
        return True

    # ---- what becomes of an evaluation -----------------------------------------------------------

    def _file(self, checkpoint: Path) -> Path:
        return self.folder / f"{checkpoint.name}.json"

    def _results(self, checkpoint: Path, digest: str) -> dict[str, Any] | None:
        """None if there are none of this very checkpoint."""
        try:
            found = read_json(self._file(checkpoint))
        except UserError:
            return None
        return found if digest and found.get("checkpoint") == digest else None

    def _report(self, checkpoint: Path) -> None:
        found = read_json(self._file(checkpoint))
        self.telemetry.tasks(layout.iteration_of(checkpoint), found["tasks"])
        log.info("evaluated %s in %s", checkpoint, duration(found["seconds"]))
        self._release(checkpoint)

    def _problem(self, said: Path, status: int) -> str:
        try:
            return task_process.problem_in(said.read_text(errors="replace"), status)
        except OSError:
            return f"exit status {status}"

    def _failed(self, checkpoint: Path, problem: str) -> None:
        log.warning("%s was not evaluated on tasks: %s; the run goes on", checkpoint, problem)
        self._event(checkpoint, "tasks_failed", {"error": problem})

    def _leave_out(self, checkpoint: Path, why: str) -> None:
        log.warning("%s is not evaluated on tasks: %s", checkpoint, why)
        self._event(checkpoint, "tasks_left_out", {"why": why})

    def _event(self, checkpoint: Path, name: str, what: dict[str, Any]) -> None:
        self._events.append((layout.iteration_of(checkpoint), name, what))
        self._say_events()
        self._release(checkpoint)

    def _say_events(self) -> None:
        """Not before the metrics are open, which they are not when a start takes up what was left."""
        while self._events and type(self.telemetry) is not Silent:
            self.telemetry.event(*self._events.pop(0))

    def _release(self, checkpoint: Path) -> None:
        with suppress(OSError):
            (checkpoint / layout.EVALUATED).unlink(missing_ok=True)

    # ---- start and end ---------------------------------------------------------------------------

    def take_up(self, found: Path | None, is_complete: bool) -> bool:
        """Takes up what an earlier start left, and the checkpoint `found` that the run goes on from; returns whether there is
        anything. Collective if the run asks for tasks."""
        if not self.is_wanted:
            if self.is_first:
                for path in self.root.glob(f"iteration-*/{layout.EVALUATED}"):
                    self._release(path.parent)
            return False
        if self.is_first:
            self._take_up(found, is_complete)
        is_any = self._running is not None or bool(self._ended)
        return bool(all_gather(is_any)[0])

    def _take_up(self, found: Path | None, is_complete: bool) -> None:
        for path in self.folder.glob(".*export-*"):  # of an evaluation that was interrupted
            shutil.rmtree(path, ignore_errors=True)
        at = layout.iteration_of(found) if found is not None and found.parent == self.root else -1
        for path in sorted(self.root.glob("iteration-*")):
            is_marked = (path / layout.EVALUATED).exists()
            if layout.iteration_of(path) > at:  # the run goes on another way
                self._release(path)
            elif self._results(path, digest_of(path)) is not None:
                self._ended += [path] if is_marked else []
            elif is_marked or (path == found and self._is_due(path, is_complete)):
                self._ask(path)

    def end(self, *, is_last: bool) -> None:
        """At the end of a part: reports what is there. If the run is complete (`is_last`), waits for the rest. Collective."""
        self.collect()
        if not self.is_wanted or not is_last:
            return
        began, end = time.monotonic(), time.monotonic() + self.settings.wait_s
        while True:
            self.watchdog.progress("waiting for training.tasks")
            is_waiting = self._running is not None and time.monotonic() < end
            states = all_gather((is_waiting, self.watchdog.seconds_left()))
            if not states[0][0] or min(left for _, left in states) < math.inf:  # asked to stop
                break
            time.sleep(ASKS_S)
            self.collect()
        if not self.is_first:
            return
        if (left := self._left()) is not None:
            log.warning(
                "not evaluated on tasks within %.0f s: %s; the same command, also of a complete run, evaluates it",
                time.monotonic() - began,
                left,
            )
            self._stop()
        try:  # what was kept for its evaluation
            layout.prune(self.root, self.keep, self.keep_every)
        except OSError as error:
            log.warning("an old checkpoint could not be removed: %s", error)

    def close(self) -> None:
        """Ends what still runs."""
        if (left := self._left()) is not None:
            log.warning("interrupted: the evaluation on tasks of %s; the next start takes it up", left)
            self._stop()

    def _left(self) -> str | None:
        """The checkpoints that are not evaluated yet."""
        waiting = [] if self._waiting is None else [self._waiting]
        return None if self._running is None else ", ".join(map(str, [self._running.checkpoint, *waiting]))

    def _stop(self) -> None:
        if self._running is not None:
            task_process.stop(self._running.process, self._file(self._running.checkpoint))
        self._running = self._waiting = None


@contextmanager
def tasks_of(config: Config, watchdog: Watchdog) -> Iterator[Tasks]:
    """Around all that a run does. Collective.

    Raises UserError on every rank for tasks that lm_eval does not know.
    """
    tasks = Tasks(config, watchdog)
    if tasks.is_wanted:
        watchdog.progress("looking for the tasks of training.tasks")
        problem = None
        if tasks.is_first:
            log.info("asking lm_eval for the tasks")
            try:
                task_process.refuse_unknown(config.training.tasks)
            except UserError as error:
                problem = str(error)
        if (problem := all_gather(problem)[0]) is not None:
            raise UserError(problem)
    try:
        yield tasks
    finally:
        tasks.close()
