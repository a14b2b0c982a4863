"""The main job: read the configuration, build, loop. Read this file first.

    deepspeed [launcher options] --module megadyn.pretrain CONFIG.yaml [key=value ...]

also under `torchrun -m megadyn.pretrain`, `mpirun python -m megadyn.pretrain`, or alone. Exit status: 0 when the
run is complete, or was asked to stop (SIGTERM) and has saved; 2 on bad input, with one line `error: ...`.
"""

import argparse
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megadyn.checkpoint import layout, save_load
from megadyn.checkpoint.same_run import changes, changes_line
from megadyn.checkpoint.start import find_start
from megadyn.checkpoint.writing import CheckpointError, Writer, all_gather
from megadyn.config import Config, batch_plan, engine_settings, load_config, save_config
from megadyn.data.batches import micro_batch_ids
from megadyn.data.files import os_errors_named
from megadyn.data.samples import Samples
from megadyn.errors import Parser, RunError, UserError
from megadyn.kinds import DENSE
from megadyn.log import log, start_logging
from megadyn.network import choosing_layers
from megadyn.parallel.grid import make_grid
from megadyn.paths import user_path
from megadyn.routing.replay import Replay
from megadyn.training import launch
from megadyn.training.data import Data, evaluation_size, open_data
from megadyn.training.engine import Engine, MicroBatch, StepResult
from megadyn.training.environment import record_start
from megadyn.training.guard import LossRule, Signals, TrainingDiverged, problem_at_end
from megadyn.training.length import Course, Position, schedule_of, settle_length
from megadyn.training.loader import Loader
from megadyn.training.lock import RunLock
from megadyn.training.optimizer import learning_rate, schedule_problem
from megadyn.training.processes import Process, launchers
from megadyn.training.profile import Profile
from megadyn.training.refuse import CHECKPOINTS, expected_start, refuse_early, refuse_login
from megadyn.training.telemetry import Telemetry
from megadyn.training.watchdog import Watchdog


def run(config: Config, watched: Sequence[Process] = ()) -> None:
    """Trains as configured. Every process of the job calls it. `watched`: launchers, with which the run ends."""
    engine_settings(config)                # read again by the engine; a mistake in it is to be known before the data are opened
    plan = batch_plan(config, launch.world_size())
    data = open_data(config, expected_start(config))
    refuse_early(config, plan, data)
    timeout_s = config.training.timeout_s
    launch.join(timeout_s + COLLECTIVE_MARGIN_S)
    with (RunLock(Path(config.output_dir)) as lock,
          Watchdog(timeout_s, config.training.grace_s, launchers=watched, lost=lambda: lock.problem) as watchdog):
        refuse_login(config)
        engine = Engine(config, plan, make_grid(config.parallel.tensor, config.parallel.pipeline), data.eod)
        watchdog.progress("setting up")
        job = Job(config, engine, data, watchdog)
        try:
            job.start()
            job.train()
            watchdog.progress("ending")        # not of a run that failed: what it was at is to be told
        finally:
            job.finish()
    dist.barrier()
    dist.destroy_process_group()


COLLECTIVE_MARGIN_S = 30.0
"""So much later than the watchdog, which can tell why, a collective gives up by itself."""


class Job:
    """One run: where it stands, and the steps that `train` calls by name."""

    def __init__(self, config: Config, engine: Engine, data: Data, watchdog: Watchdog):
        self.config, self.engine, self.data, self.watchdog = config, engine, data, watchdog
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / CHECKPOINTS
        self.iteration = 0
        self.consumed_samples = 0
        self.course = Course(config.training.global_batch_size)
        self.saved_at = -1                                   # the newest whole checkpoint's iteration
        self.forked_from: str | None = None
        self.evaluations: dict[str, dict[str, float]] = {}   # the last of each set
        self.has_ended = False
        self.stall_s = 0.0                                   # how long training waited for the checkpoint being written
        self.telemetry: Telemetry | None = None              # rank 0's
        self.profile: Profile | None = None
        self.replay = Replay(config, engine.routed, choosing_layers(config.model), engine.grid, data.train.key)
        self.loss_rule = LossRule(config.training)
        self.signals = Signals(watchdog.asked_to_stop)
        watchdog.request_stop = self.signals.request
        self.writer = Writer(self.checkpoints, config)

    @property
    def total(self) -> int:
        """The number of the last step."""
        return self.config.training.iterations or 0

    @property
    def position(self) -> Position:
        return Position(self.iteration, self.consumed_samples)

    def start(self) -> None:
        """Sets the starting weights and position: a checkpoint's, a Hugging Face folder's, or drawn from the seed. Where
        nothing is left to do, nothing in the output folder is touched."""
        settings, changed = self.config.checkpoint, {}
        self.watchdog.progress("verifying checkpoints")
        if settings.fork_from:
            self.forked_from = str(Path(settings.fork_from).resolve())
        if found := find_start(settings, self.checkpoints):
            changed = changes(self.config, found)
            self.consumed_samples = self.load(found)
            log.info("resumed from %s", found)
            if changed:
                log.info("changed since that checkpoint: %s", changes_line(changed))
        elif settings.init_from:
            save_load.init_from(self.engine, Path(settings.init_from))
            log.info("weights from %s", settings.init_from)
        self.set_course()
        if found and self.iteration >= self.total:
            self.refuse_condemned(found)
            log.info("nothing to do: the run stands at iteration %d of %d", self.iteration, self.total)
            return
        self.open_folder()
        if changed and self.telemetry:
            self.telemetry.event(self.iteration, "resumed", {"from": str(found), "changed": changed})

    def open_folder(self) -> None:
        """Opens what the run writes into its output folder. Collective."""
        grid, device = self.engine.grid, self.engine.device
        with os_errors_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            record_start(self.folder, grid, self.engine.zero_stage, device, self.iteration, self.total)
            self.profile = Profile(self.config.logging, self.folder, dist.get_rank(), self.iteration)
            if dist.get_rank() == 0:
                save_config(self.config, self.folder / "config.yaml")
                log.info("%s", self.engine.run_line())
                if problem := schedule_problem(self.config.optimizer, self.total):
                    log.warning("%s", problem)
                self.telemetry = Telemetry(self.config, dist.get_world_size(), self.folder, self.iteration,
                                           torch.cuda.get_device_name(device) if device.type == "cuda" else None)

    def load(self, checkpoint: Path) -> int:
        """Sets the engine, the iteration and the loss rule to a checkpoint's; returns the samples consumed by then."""
        self.watchdog.progress(f"loading {checkpoint}")
        data_key = None if self.config.checkpoint.allow_other_data else self.data.train.key
        manifest = save_load.load(self.engine, checkpoint, data_key)
        self.iteration = self.saved_at = manifest["iteration"]
        self.course = Course.from_manifest(manifest)
        if manifest["loss_rule"]:
            self.loss_rule.set_state(manifest["loss_rule"])
        return int(manifest["consumed_samples"])

    def set_course(self) -> None:
        """Works out, from where the run stands, how many steps are left."""
        self.course.go_on(self.position, self.engine.plan.global_batch)
        settle_length(self.config, self.data.train, self.position)

    def train(self) -> None:
        if self.iteration == 0:
            self.evaluate("validation", self.data.validation)
        batch, stopping, is_new = self.engine.plan.global_batch, False, self.iteration < self.total
        while self.iteration < self.total and not stopping:
            # Anew after a rollback: then more steps follow than there were samples for.
            end = self.config.training.samples_at_end(*self.position)
            with self.loader(self.data.train, self.consumed_samples, end, step=batch) as loader:
                stopping = self.steps(loader)
        if is_new and self.iteration >= self.total and not self.has_ended:       # a rollback left nothing to do
            self.end()
        if stopping:
            log.info("stopped by %s after iteration %d; start again to go on", self.signals.reason(), self.iteration)

    def steps(self, loader: Loader) -> bool:
        """Steps until the run is complete or has gone back to a checkpoint; true if it was asked to stop."""
        while self.iteration < self.total:
            before = self.iteration
            if self.step(loader):
                return True
            if self.iteration <= before:
                break
        return False

    def step(self, loader: Loader) -> bool:
        """One step, and what is due behind it; true if the run was asked to stop."""
        assert self.profile is not None
        number = self.iteration + 1
        rate = learning_rate(self.config.optimizer, self.iteration, self.total,
                             schedule_of(self.config, self.course, self.position))
        is_measured = self.due(self.config.logging.interval, number)
        self.profile.before_step(number)
        with self.replay.step(number, self.consumed_samples):
            result = self.engine.train_step(self.watched(loader), rate, self.loss_rule.limit, measure=is_measured)
        self.iteration = number
        self.consumed_samples += self.engine.plan.global_batch
        if self.telemetry:
            self.telemetry.step(number, loader.take_wait())
        stopping, is_written = self.signals.ask(self.writer.is_busy)
        if result.problem:
            self.take_bad_step(result)
        else:
            self.loss_rule.note(number, float(result.loss))
            if is_measured or stopping:
                self.report(result, rate, is_measured)
        if self.profile.after_step(number) and self.telemetry:
            self.telemetry.restart_clock(self.iteration)
        if is_written:
            self.finish_save(last=False)
        if self.due(self.config.checkpoint.interval) or stopping:
            self.save(last=stopping or self.iteration == self.total)
        if self.iteration == self.total:
            self.end()
        elif self.due(self.config.training.eval_interval):
            self.evaluate("validation", self.data.validation)
        return stopping

    def end(self) -> None:
        """Evaluates the complete run. Raises TrainingDiverged, and marks the last checkpoint, if its model gives NaN."""
        self.has_ended = True
        self.evaluations.clear()
        self.evaluate("validation", self.data.validation)
        self.evaluate("test", self.data.test)
        problem = problem_at_end(self.evaluations, self.loss_rule.last_loss)
        if problem is None:
            return
        last = self.checkpoints / layout.folder_name(self.iteration)
        if dist.get_rank() == 0 and last.exists():
            with os_errors_named(last):
                layout.mark_not_good(last, problem)
        raise TrainingDiverged(f"{problem}: {last} does not count as good; go back to an earlier checkpoint "
                               "(checkpoint.fork_from), with a smaller learning rate or other loss weights")

    def refuse_condemned(self, checkpoint: Path) -> None:
        """TrainingDiverged for a complete run whose only checkpoint `end` has marked. Collective."""
        if problem := all_gather(layout.condemned(checkpoint))[0]:
            raise TrainingDiverged(f"{checkpoint} is complete, but not good: {problem}")

    def loader(self, samples: Samples, first: int, end: int, step: int) -> Loader:
        """This rank's micro-batches of samples `first` to `end`; a stage between the first and the last reads none."""
        grid, plan = self.engine.grid, self.engine.plan
        reads = grid.is_first_stage or grid.is_last_stage
        ids = micro_batch_ids(first, end if reads else first, global_batch=step, micro_batch=plan.micro_batch,
                              dp_rank=grid.dp.rank, dp_size=grid.dp.size)
        return Loader(samples, ids, self.engine.device)

    def watched(self, loader: Loader) -> Iterator[MicroBatch]:
        """The micro-batches of the next step. Reading and computing show apart in what the watchdog tells."""
        number = self.iteration + 1
        self.watchdog.progress(f"in step {number}")
        batches = islice(loader, self.engine.plan.micro_batches)
        while True:
            self.watchdog.progress(f"reading samples of step {number}")
            batch = next(batches, None)
            self.watchdog.progress(f"in step {number}")
            if batch is None:
                return
            yield batch

    def due(self, interval: int, iteration: int | None = None) -> bool:
        """At every `interval`-th iteration and the last; at the last only where `interval` is 0."""
        iteration = self.iteration if iteration is None else iteration
        return iteration == self.config.training.iterations or (interval > 0 and iteration % interval == 0)

    def report(self, result: StepResult, rate: float, is_measured: bool) -> None:
        """Metrics of the last step. One that a signal made the last is reported without what only a measured step has."""
        routing = self.engine.routing_statistics()
        more: dict[str, Any] = {"learning_rates": self.engine.learning_rates()}
        if is_measured:
            more |= self.engine.step_statistics(float(result.grad_norm))
        if self.telemetry:
            self.telemetry.train(self.iteration, consumed_samples=self.consumed_samples, lm_loss=float(result.loss),
                                 grad_norm=float(result.grad_norm), learning_rate=rate, routing=routing,
                                 bad_steps=self.loss_rule.bad_steps, more=more)

    def take_bad_step(self, result: StepResult) -> None:
        """Does after a bad step what training.on_bad_step asks for; it has not reached the weights. Raises TrainingDiverged."""
        cfg, at = self.config.training, self.iteration
        self.loss_rule.note_bad(at, float(result.loss))
        samples = f"samples {self.consumed_samples - cfg.global_batch_size} to {self.consumed_samples - 1}"
        said = f"step {at} ({samples}) is bad: {result.problem}"
        kept = f"the step was not taken, and nothing was saved since iteration {max(0, self.saved_at)}"
        if cfg.on_bad_step == "stop":
            raise TrainingDiverged(f"{said}; {kept} (training.on_bad_step: skip or rollback goes on)")
        if excess := self.loss_rule.excess():
            raise TrainingDiverged(f"{said}, and it makes {excess}; {kept}")
        if cfg.on_bad_step == "rollback":
            self.finish_save(last=False)
            checkpoint = save_load.newest_good(self.checkpoints, only_good=True)
            if checkpoint is None:
                raise TrainingDiverged(f"{said}, and there is no good checkpoint to go back to; {kept}")
            self.load(checkpoint)
            self.set_course()
        log.warning("%s; %s (%d bad steps so far)", said, f"back to iteration {self.iteration}, on with the samples after it"
                    if cfg.on_bad_step == "rollback" else "skipped", self.loss_rule.bad_steps)
        self.engine.routing_statistics()                     # the bad step's are dropped
        if self.telemetry:
            if cfg.on_bad_step == "rollback":
                self.telemetry.go_back(self.iteration, self.total)
            self.telemetry.event(self.iteration, "bad_step", {
                "iteration": at, "problem": result.problem, "action": cfg.on_bad_step, "lm_loss": float(result.loss),
                "consumed_samples": self.consumed_samples, "bad_steps": self.loss_rule.bad_steps})

    def evaluate(self, name: str, samples: Samples | None) -> None:
        """Loss on held-out samples under each routing; a dense model has one, which stands for both."""
        if samples is None:
            return
        plan = self.engine.plan
        size = evaluation_size(name, samples, self.config.training.eval_samples, plan)
        routed = self.config.model.routing.name != DENSE
        losses = {}
        self.watchdog.progress(f"evaluating after step {self.iteration}")
        for mode in ("topk", "causal") if routed else ("topk",):
            with self.loader(samples, 0, size, step=size) as loader:
                losses[mode] = self.engine.evaluate(loader, size // (plan.micro_batch * plan.data_parallel), mode)
        losses.setdefault("causal", losses["topk"])
        self.evaluations[name] = losses
        if self.telemetry:
            self.telemetry.evaluation(self.iteration, name, losses)

    def save(self, last: bool) -> None:
        """Saves; where it is the run's last, the checkpoint is whole when this returns."""
        self.watchdog.progress(f"saving iteration {self.iteration}")
        self.finish_save(last=False)                         # one at a time
        if self.saved_at != self.iteration:
            began = time.perf_counter()
            self.writer.start(save_load.snapshot(
                self.engine, iteration=self.iteration, consumed_samples=self.consumed_samples, data_key=self.data.train.key,
                loss_rule=self.loss_rule.state(), more={"course": self.course.state(), "forked_from": self.forked_from}))
            self.stall_s = time.perf_counter() - began
            if last or not self.config.checkpoint.background:
                self.finish_save(last)
        if self.telemetry:
            self.telemetry.restart_clock(self.iteration)

    def finish_save(self, last: bool) -> None:
        """Waits for the checkpoint that is being written, if any; at its failure does what checkpoint.on_error asks for."""
        began = time.perf_counter()
        try:
            written = self.writer.collect()
        except CheckpointError as error:
            if last or self.config.checkpoint.on_error == "stop":
                raise
            log.warning("%s; the run goes on, its newest checkpoint is of iteration %d", error, max(0, self.saved_at))
            if self.telemetry:
                self.telemetry.event(self.iteration, "checkpoint", {"error": str(error)})
            return
        if written:
            self.saved_at = written.iteration
            stall_s = self.stall_s + time.perf_counter() - began
            log.info("saved %s: training waited %.2f s, written in %.2f s", written.folder, stall_s, written.write_s)
            if self.telemetry:
                self.telemetry.event(self.iteration, "checkpoint", {
                    "iteration": written.iteration, "stall_s": stall_s, "write_s": written.write_s, "rank_bytes": written.bytes})

    def finish(self) -> None:
        """Ends what reports, also of a run that failed."""
        if self.profile:
            self.profile.finish(self.iteration)
        if self.telemetry:
            self.telemetry.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="megadyn.pretrain", description="Pretrain a routed transformer.")
    parser.add_argument("config", type=user_path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.iterations=20")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)     # the launcher passes it; LOCAL_RANK counts
    launch.adopt_mpi_ranks()
    watched = launchers() if "RANK" in os.environ else []        # at once: it may end while the ranks meet
    start_logging()
    try:
        args = parser.parse_args(argv)
        run(load_config(args.config, args.overrides), watched)
    except UserError as error:
        say(error)
        return 2
    except RunError as error:
        if not error.is_everywhere or os.environ.get("RANK") == "0":
            say(error)
        return 1
    return 0


def say(error: Exception) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    print(f"error: {f'[local rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)


def main_of_a_rank() -> NoReturn:
    """`main` for a process of its own. One that failed waits for nothing: not for collectives that will never end."""
    faulthandler.enable()                          # a segmentation fault shows where
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(0)


if __name__ == "__main__":
    main_of_a_rank()
