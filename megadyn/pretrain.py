"""The main job: reads the configuration, builds everything, and runs the loop. Read this file first.

    deepspeed [launcher options] --module megadyn.pretrain CONFIG.yaml [key=value ...]

It also runs under `torchrun -m megadyn.pretrain`, `mpirun python -m megadyn.pretrain`, or alone. Exit status: 0 if the
run is complete, or was asked to stop (SIGTERM) and has saved; 2 for invalid input, with one line `error: ...`.
"""

from megadyn.log import loading, log, start_logging

if __name__ == "__main__":
    loading("torch and DeepSpeed")  # said first: the imports below take seconds

import argparse
import faulthandler
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from megadyn.checkpoint import layout
from megadyn.checkpoint.start import find_start
from megadyn.config import Config, load_config
from megadyn.data.batches import micro_batch_ids
from megadyn.data.samples import Samples
from megadyn.data.text_bytes import in_bits_per_byte, mean_bytes_per_token
from megadyn.engine.ending import collect_memory, release
from megadyn.engine.engine import Engine, MicroBatch, StepResult
from megadyn.errors import Parser, RunError, UserError, say_on_rank
from megadyn.kinds import DENSE
from megadyn.launch import launch
from megadyn.launch.deterministic import be_deterministic
from megadyn.launch.lock import RunLock
from megadyn.launch.processes import Process, launchers, while_alive
from megadyn.launch.signals import Signals
from megadyn.launch.watchdog import Watchdog
from megadyn.network import choosing_layers
from megadyn.parallel.grid import Grid, make_grid
from megadyn.paths import user_path
from megadyn.progress import each
from megadyn.routing.replay import Replay
from megadyn.telemetry.profile import Windows
from megadyn.telemetry.telemetry import Silent
from megadyn.training.bad_steps import BadSteps
from megadyn.training.checkpoints import Checkpoints
from megadyn.training.data import Data, evaluation_size
from megadyn.training.garbage import Garbage
from megadyn.training.loader import Loader
from megadyn.training.loss_rule import TrainingDiverged, problem_at_end
from megadyn.training.mirroring import mirrored
from megadyn.training.output import output_folder
from megadyn.training.phases import Part, end_of_phase_before, open_parts, part_at, phase_record
from megadyn.training.preflight import make_output_dir, refuse_login
from megadyn.training.state import RunState
from megadyn.training.tasks import Tasks, tasks_of


def run(config: Config, watched: Sequence[Process] = ()) -> None:
    """Trains as configured. Every process of the job calls it. `watched`: launchers; when they end, the run ends."""
    be_deterministic(config.training.deterministic)
    with while_alive(watched):
        parts = None if config.checkpoint.mirror else open_parts(config, launch.world_size())
        if parts is None:
            make_output_dir(config)
        launch.join(config.training.collective_timeout_s)
    with (
        RunLock(Path(config.output_dir)) as lock,
        Watchdog(
            config.training.timeout_s,
            config.training.grace_s,
            output_dir=Path(config.output_dir),
            launchers=watched,
            lost=lambda: lock.problem,
        ) as watchdog,
    ):
        refuse_login(config)
        with tasks_of(config, watchdog) as tasks, mirrored(config, watchdog):
            # What is checked depends on where the run goes on, and so on what it has fetched.
            parts = parts or open_parts(config, launch.world_size())
            train(config, parts, make_grid(config.parallel.tensor, config.parallel.pipeline), tasks, watchdog)
    dist.barrier()
    dist.destroy_process_group()


def train(config: Config, parts: Sequence[Part], grid: Grid, tasks: Tasks, watchdog: Watchdog) -> None:
    """Trains from the current iteration to the end: each phase in an engine of its own, from the checkpoint of the one before.
    A run without phases is a single part."""
    root = Path(config.output_dir) / layout.CHECKPOINTS
    watchdog.progress("verifying checkpoints")
    found, signals = find_start(config.checkpoint, root), None
    at = layout.read_manifest(found)["iteration"] if found else 0
    for part in parts[part_at(parts, at) :]:
        if signals is not None:
            found = end_of_phase_before(part, root, watchdog)
            if signals.ask(at_once=True).stop:
                log.info("stopped by %s between two phases; start again to continue", signals.reason())
                return
        watchdog.progress("building the model")
        log.info("building the model and DeepSpeed's engine")
        engine = Engine(part.config, part.plan, grid, part.data.eod)
        watchdog.progress("setting up")
        is_start = signals is None
        signals = signals or Signals(watchdog.asked_to_stop)
        watchdog.request_stop = signals.request
        has_stopped = train_part(part, engine, config, found, is_start, signals, tasks, watchdog)
        if has_stopped or part is parts[-1]:
            return
        release(engine)
        del engine
        collect_memory()


def train_part(
    part: Part,
    engine: Engine,
    whole: Config,
    found: Path | None,
    is_start: bool,
    signals: Signals,
    tasks: Tasks,
    watchdog: Watchdog,
) -> bool:
    """Trains from the verified checkpoint `found` to the end of `part`; returns whether the run was asked to stop. If nothing is
    left to do, does not touch the output folder.

    Args:
        whole: the configuration of the run. is_start: whether the processes have just started.
    """
    config, data = part.config, part.data
    state = RunState(config, data.train)
    checkpoints = Checkpoints(config, engine, state, watchdog, tasks)
    changed = checkpoints.resume(found)
    if found and (state.is_complete or state.begins_phase):
        checkpoints.refuse_condemned(found)
    has_tasks = is_start and tasks.take_up(found, state.is_complete and part.is_last)
    if found and state.is_complete and not has_tasks:
        log.info("nothing to do: the run is at iteration %d of %d", state.iteration, state.total)
        return False
    with output_folder(whole, part, engine, state) as (telemetry, windows):
        checkpoints.telemetry = tasks.telemetry = telemetry
        if changed and is_start:
            telemetry.event(state.iteration, "resumed", {"from": str(found), "changed": changed})
        if state.begins_phase:
            telemetry.event(state.iteration, "phase_begins", phase_record(config))
        job = Job(config, engine, data, state, checkpoints, telemetry, windows, signals, watchdog)
        has_stopped = job.train()
        tasks.end(is_last=part.is_last and not has_stopped)
        watchdog.progress("ending")  # skipped on failure, so that the watchdog reports what the run was doing
    return has_stopped


class Job:
    """The training loop, and the operations that it calls by name."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: Data,
        state: RunState,
        checkpoints: Checkpoints,
        telemetry: Silent,
        windows: Windows,
        signals: Signals,
        watchdog: Watchdog,
    ):
        self.config, self.engine, self.data = config, engine, data
        self.state, self.checkpoints = state, checkpoints
        self.telemetry, self.windows, self.signals, self.watchdog = telemetry, windows, signals, watchdog
        self.bad_steps = BadSteps(config.training, state, checkpoints, telemetry)
        self.replay = Replay(
            config, engine.routed, choosing_layers(config.model), engine.grid, data.train.key
        )
        self.garbage = Garbage(config.training.gc_interval)
        self.evaluations: dict[str, dict[str, float]] = {}  # the latest of each set
        self.has_ended = state.is_complete  # of a complete run only tasks are left

    def train(self) -> bool:
        """Runs all steps that are left; returns whether it was asked to stop before or at the last one."""
        state, stopping = self.state, False
        if state.iteration == 0:
            self.validate()
        while not (state.is_complete or stopping):
            # Recomputed after a rollback, which repeats steps with new samples.
            end = self.config.training.samples_at_end(*state.position)
            samples = self.loader(
                self.data.train, state.consumed_samples, end, step=self.engine.plan.global_batch
            )
            with samples as loader, self.garbage:
                stopping = self.steps(loader)
        if state.is_complete and not self.has_ended:  # a rollback left nothing to do
            self.end()
        if stopping:
            log.info(
                "stopped by %s after iteration %d; start again to continue",
                self.signals.reason(),
                state.iteration,
            )
        return stopping

    def steps(self, loader: Loader) -> bool:
        """Runs steps until the run is complete or has gone back to a checkpoint; returns True if it was asked to stop."""
        while not self.state.is_complete:
            before = self.state.iteration
            if self.step(loader):
                return True
            if self.state.iteration <= before:
                break
        return False

    def step(self, loader: Loader) -> bool:
        """Runs one step and what is due after it; returns True if the run was asked to stop."""
        state, number = self.state, self.state.iteration + 1
        rate = state.rate()
        is_measured = state.due(self.config.logging.interval, number)
        self.windows.before_step(number)
        began = time.perf_counter()
        with self.replay.step(number, state.consumed_samples):
            result = self.engine.train_step(
                self.watched(loader), rate, *state.loss_rule.limits, measure=is_measured
            )
        state.step_taken(time.perf_counter() - began)
        self.telemetry.step(number, loader.take_wait())
        self.checkpoints.tasks.collect()
        stopping, is_written, is_over = self.signals.ask(
            self.checkpoints.writer.is_busy, state.is_time_up and dist.get_rank() == 0
        )
        if is_over and not result.problem:
            state.end_now()
            self.telemetry.event(number, "time_is_up", {"seconds": state.seconds})
        if result.problem:
            self.bad_steps.take(result)
            self.engine.routing_statistics()  # discard those of the bad step
        else:
            state.loss_rule.note(number, float(result.loss), float(result.grad_norm))
            if is_measured or stopping or is_over:
                self.report(result, rate, is_measured)
        self.garbage.after_step(number)
        if self.windows.after_step(number):
            self.telemetry.restart_clock(state.iteration)
        if is_written:
            self.checkpoints.finish_save(last=False)
        if state.due(self.config.checkpoint.interval) or stopping:
            self.checkpoints.save(last=stopping or state.iteration == state.total)
        if state.iteration == state.total:
            self.end()
        elif state.due(self.config.training.eval_interval):
            self.validate()
        return stopping

    def end(self) -> None:
        """Evaluates the complete run or phase. Raises TrainingDiverged, and marks the last checkpoint, if its model gives NaN."""
        state, self.has_ended = self.state, True
        self.evaluations.clear()
        self.validate()
        if self.config.phase is None or state.iteration == self.config.last_iteration:
            self.evaluate("test", self.data.test)
        last_loss, plan = state.loss_rule.last_loss, self.engine.plan
        if not self.evaluations and math.isfinite(last_loss):  # no loss contains the last update yet
            round_size = plan.micro_batch * plan.data_parallel
            first = self.config.data.origin
            self.evaluations["training"] = self.losses("training", self.data.train, round_size, first)
        if problem := problem_at_end(self.evaluations, last_loss):
            last = self.checkpoints.condemn_last(problem)
            raise TrainingDiverged(
                f"{problem}: {last} does not count as good; go back to an earlier checkpoint "
                "(checkpoint.fork_from), with a smaller learning rate or other loss weights"
            )
        self.checkpoints.mark_best()

    def loader(self, samples: Samples, first: int, end: int, step: int) -> Loader:
        """This rank's micro-batches of samples `first` to `end`; pipeline stages in the middle read none."""
        grid, plan = self.engine.grid, self.engine.plan
        reads = grid.is_first_stage or grid.is_last_stage
        ids = micro_batch_ids(
            first,
            end if reads else first,
            global_batch=step,
            micro_batch=plan.micro_batch,
            dp_rank=grid.dp.rank,
            dp_size=grid.dp.size,
        )
        return Loader(samples, ids, self.engine.device)

    def watched(self, loader: Loader) -> Iterator[MicroBatch]:
        """The micro-batches of the next step. Tells the watchdog whether the rank is reading or computing."""
        number = self.state.iteration + 1
        self.watchdog.progress(f"in step {number}")
        batches = islice(loader, self.engine.plan.micro_batches)
        while True:
            self.watchdog.progress(f"reading samples of step {number}")
            batch = next(batches, None)
            self.watchdog.progress(f"in step {number}")
            if batch is None:
                return
            yield batch

    def report(self, result: StepResult, rate: float, is_measured: bool) -> None:
        """Reports metrics of the last step. Of a step that was not measured (something ended the run) there are fewer."""
        loss, norm, state = float(result.loss), float(result.grad_norm), self.state
        routing = self.engine.routing_statistics()
        more: dict[str, Any] = {"learning_rates": self.engine.learning_rates()}
        if is_measured:
            more |= self.engine.step_statistics(norm)
        rank_ms = more.pop("rank_ms", None)
        self.telemetry.train(
            state.iteration,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            lm_loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            routing=routing,
            bad_steps=state.loss_rule.bad_steps,
            rank_ms=rank_ms,
            more=more,
        )

    def validate(self) -> None:
        for name, samples in self.data.validations.items():
            self.evaluate(name, samples)

    def evaluate(self, name: str, samples: Samples | None) -> None:
        """Loss on held-out samples with each routing mode; a dense model has only one loss, which is reported for both."""
        if samples is None:
            return
        size = evaluation_size(name, samples, self.config.training.eval_samples, self.engine.plan)
        losses = self.evaluations[name] = self.losses(name, samples, size)
        # The records of sets without a name stay as other tools know them.
        per_token = mean_bytes_per_token(samples) if "/" in name else None
        bits = None if per_token is None else in_bits_per_byte(losses, per_token)
        self.telemetry.evaluation(self.state.iteration, name, losses, bits)
        self.checkpoints.evaluated(name, losses["causal"])

    def losses(self, name: str, samples: Samples, size: int, first: int = 0) -> dict[str, float]:
        """Mean loss of `size` samples from `first` on, by routing mode."""
        plan, losses = self.engine.plan, {}
        routed = self.config.model.routing.name != DENSE
        rounds = size // (plan.micro_batch * plan.data_parallel)
        self.watchdog.progress(f"evaluating after step {self.state.iteration}")
        for mode in ("topk", "causal") if routed else ("topk",):
            with self.loader(samples, first, first + size, step=size) as loader:
                batches = each(loader, f"{name} loss, {mode}", rounds)
                losses[mode] = self.engine.evaluate(batches, rounds, mode)
        losses.setdefault("causal", losses["topk"])
        return losses


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="megadyn.pretrain", description="Pretrain a routed transformer.")
    parser.add_argument("config", type=user_path, help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.iterations=20"
    )
    # Passed by launchers; ignored, because LOCAL_RANK is used.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    launch.adopt_mpi_ranks()
    # Now, because a launcher may end while the ranks meet.
    watched = launchers() if "RANK" in os.environ else []
    start_logging()
    try:
        args = parser.parse_args(argv)
        with while_alive(watched):
            config = load_config(args.config, args.overrides)
        run(config, watched)
    except UserError as error:
        say_on_rank(error)
        return 2
    except RunError as error:
        if not error.is_everywhere or os.environ.get("RANK") == "0":
            say_on_rank(error)
        return 1
    return 0


def main_of_a_rank(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` in a process of its own. On failure it exits at once, without waiting for collectives that would never finish."""
    faulthandler.enable()  # shows a traceback after a segmentation fault
    try:
        status = main(argv)
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
