"""When a run saves, what it does if saving fails, and which checkpoint it starts from or goes back to."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megadyn.checkpoint import layout, save_load
from megadyn.checkpoint.host_copies import HostCopies
from megadyn.checkpoint.same_run import changes, changes_line
from megadyn.checkpoint.together import CheckpointError
from megadyn.checkpoint.trained import Trained
from megadyn.checkpoint.writing import Writer, Written
from megadyn.config import CheckpointConfig, Config
from megadyn.config.data import UNNAMED
from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.hub import MODEL, local_path
from megadyn.launch.watchdog import Watchdog
from megadyn.log import log
from megadyn.parallel.objects import all_gather
from megadyn.telemetry.telemetry import Silent
from megadyn.training.loss_rule import TrainingDiverged
from megadyn.training.state import RunState
from megadyn.training.tasks import Tasks


def starting_weights(settings: CheckpointConfig) -> Path:
    """The folder that `init_from` names, downloaded if it is an address; raises UserError if there is none."""
    given = settings.init_from
    assert given is not None
    return local_path(given, f"checkpoint.init_from = {given!r}", MODEL)


class Checkpoints:
    """The checkpoints of a run. Every method is collective."""

    def __init__(self, config: Config, engine: Trained, state: RunState, watchdog: Watchdog, tasks: Tasks):
        self.config, self.engine, self.state, self.watchdog = config, engine, state, watchdog
        self.tasks = tasks
        self.root = Path(config.output_dir) / layout.CHECKPOINTS
        self.telemetry = Silent()  # until the run's own telemetry is opened
        self.writer = Writer(self.root, config)
        self.copies = HostCopies()  # each save waits until the one before is written
        self._losses: dict[int, float] = {}  # by iteration, for `checkpoint.keep_best`
        self._snapshot_s = 0.0  # how long training waited for the checkpoint that is being written

    def resume(self, found: Path | None) -> dict[str, Any]:
        """Sets the starting weights and position, from the verified checkpoint `found`, a Hugging Face folder or the seed.
        Returns the settings that changed since the checkpoint."""
        settings, changed = self.config.checkpoint, {}
        if settings.fork_from:
            self.state.forked_from = str(Path(settings.fork_from).resolve())
        if found:
            changed = changes(self.config, found)
            self.state.resume(self.load(found))
            log.info("resumed from %s", found)
            if changed:
                log.info("changed since that checkpoint: %s", changes_line(changed))
        elif settings.init_from:
            folder = starting_weights(settings)
            if len(names := set(all_gather(folder.name))) > 1:
                raise UserError(
                    f"checkpoint.init_from = {settings.init_from!r}: the machines of the job have different commits of it "
                    f"({', '.join(sorted(names))}): name one of them, as ORG/NAME@COMMIT"
                )
            save_load.init_from(self.engine, folder)
            log.info("weights from %s", settings.init_from)
        self.state.set_course()
        return changed

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Sets the state of the engine and of the run from a checkpoint; returns its manifest."""
        self.watchdog.progress(f"loading {checkpoint}")
        self._losses.clear()
        data_key = None if self.config.checkpoint.allow_other_data else self.state.train.key
        manifest = save_load.load(self.engine, checkpoint, data_key)
        self.state.take(manifest)
        if "averaged" in manifest:
            log.info("%s is an average: the optimizer's moments start from zero", checkpoint)
        return manifest

    def go_back(self) -> bool:
        """Goes back to the newest good checkpoint, but continues with new samples. Returns False if there is no such
        checkpoint since the phase began."""
        self.finish_save(last=False)
        checkpoint = save_load.newest_good(self.root, only_good=True)
        begin = self.config.phase.begin if self.config.phase else 0
        if checkpoint is None or layout.iteration_of(checkpoint) < begin:
            return False
        self.load(checkpoint)
        self.state.set_course()
        self.tasks.go_back(self.state.iteration)
        return True

    def save(self, last: bool) -> None:
        """Saves. If this is the run's last checkpoint (`last`), waits until it is complete."""
        state = self.state
        self.watchdog.progress(f"saving iteration {state.iteration}")
        self.finish_save(last=False)  # one at a time
        if state.saved_at != state.iteration:
            began = time.perf_counter()
            self.writer.start(
                save_load.snapshot(
                    self.engine,
                    iteration=state.iteration,
                    consumed_samples=state.consumed_samples,
                    data_key=state.train.key,
                    loss_rule=state.loss_rule.state(),
                    more={
                        "course": state.course.state(),
                        "forked_from": state.forked_from,
                        "consumed_tokens": state.consumed_tokens,
                        "seconds": state.seconds,
                        "data_origin": self.config.data.origin,
                        **({"phases": self.config.phase.passed} if self.config.phase else {}),
                    },
                    copies=self.copies,
                )
            )
            self._snapshot_s = time.perf_counter() - began
            if last or not self.config.checkpoint.background:
                self.finish_save(last)
        self.telemetry.restart_clock(state.iteration)

    def finish_save(self, last: bool) -> None:
        """Waits for the checkpoint that is being written, if any. If that failed, does what checkpoint.on_error says."""
        state, began = self.state, time.perf_counter()
        try:
            written = self.writer.collect()
        except CheckpointError as error:
            if last or self.config.checkpoint.on_error == "stop":
                raise
            log.warning(
                "%s; the run continues; its newest checkpoint is from iteration %d",
                error,
                max(0, state.saved_at),
            )
            self.telemetry.event(state.iteration, "checkpoint", {"error": str(error)})
            return
        if written:
            self._saved(written, self._snapshot_s + time.perf_counter() - began)

    def _saved(self, written: Written, stall_s: float) -> None:
        """Reports a checkpoint, and its average if there is one."""
        state, average, problem = self.state, written.average, written.average_error
        state.saved_at = written.iteration
        self.mark_best()
        log.info(
            "saved %s: training waited %.2f s, written in %.2f s", written.folder, stall_s, written.write_s
        )
        what: dict[str, Any] = {
            "iteration": written.iteration,
            "stall_s": stall_s,
            "write_s": written.write_s,
            "rank_bytes": written.bytes,
        }
        if average:
            log.info("averaged %d into %s in %.2f s", average.size, average.folder, average.write_s)
            what |= {"averaged": average.size, "average_s": average.write_s}
        if problem:
            what |= {"average_error": str(problem)}
        self.telemetry.event(state.iteration, "checkpoint", what)
        is_last = written.iteration == state.total and (
            self.config.phase is None or self.config.phase.is_last
        )
        self.tasks.saved(written.folder, is_last)
        if problem and self.config.checkpoint.on_error == "stop":
            raise problem
        if problem:
            log.warning("%s; the checkpoint is complete, and the run continues", problem)

    def evaluated(self, name: str, loss: float) -> None:
        """Notes a loss at the current iteration on the set `name`, as in metrics."""
        wanted = self.config.checkpoint.keep_best
        if name == f"{UNNAMED}/{wanted}" or name == wanted == UNNAMED:
            self._losses[self.state.iteration] = loss
            if not self.state.is_complete:  # of a complete run's model all sets are judged first
                self.mark_best()

    def mark_best(self) -> None:
        """Marks the newest complete checkpoint as the best one if it is. It may be complete before or after its evaluation."""
        at, validation = self.state.saved_at, self.config.checkpoint.keep_best
        loss = self._losses.get(at)
        self._losses = {iteration: known for iteration, known in self._losses.items() if iteration > at}
        if validation is None or loss is None or dist.get_rank() != 0:
            return
        folder = self.root / layout.folder_name(at)
        try:
            is_best = layout.mark_best(folder, validation, loss)
        except OSError as error:
            problem = CheckpointError(f"{folder}: not marked as the best: {error.strerror or error}")
            if self.config.checkpoint.on_error == "stop":
                raise problem from None
            log.warning("%s; the run continues", problem)
            return
        if is_best:
            log.info("%s is the best so far: %s loss %.4f", folder, validation, loss)
            self.telemetry.event(
                self.state.iteration,
                "best_checkpoint",
                {"iteration": at, "validation": validation, "loss": loss},
            )

    def condemn_last(self, problem: str) -> Path:
        """Marks the last step's checkpoint, if there is one, and its average as not good; returns the checkpoint's path."""
        last = self.root / layout.folder_name(self.state.iteration)
        for folder in (last, self.root.with_name(layout.AVERAGES) / last.name):
            if dist.get_rank() == 0 and folder.exists():
                with os_errors_named(folder):
                    layout.mark_not_good(folder, problem)
        return last

    def refuse_condemned(self, checkpoint: Path) -> None:
        """Raises TrainingDiverged if the checkpoint of a complete run is marked as not good."""
        if problem := all_gather(layout.condemned(checkpoint))[0]:
            raise TrainingDiverged(f"{checkpoint} is complete, but not good: {problem}")
