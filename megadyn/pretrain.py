"""The main job: read the configuration, build, loop. Read this file first.

    deepspeed [launcher options] --module megadyn.pretrain CONFIG.yaml [key=value ...]

also under `torchrun -m megadyn.pretrain`, `mpirun python -m megadyn.pretrain`, or alone. Exit status: 0 when the
run is complete, or was asked to stop (SIGTERM) and has saved; 2 on bad input, with one line `error: ...`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from megadyn.checkpoint import save_load
from megadyn.checkpoint.layout import read_manifest, resolve
from megadyn.config import BatchPlan, Config, batch_plan, engine_settings, load_config, save_config
from megadyn.data.batches import micro_batch_ids
from megadyn.data.files import os_errors_named
from megadyn.data.samples import Samples
from megadyn.errors import ConfigError, Parser, UserError
from megadyn.hf.reader import HfFolder
from megadyn.log import log, start_logging
from megadyn.model.attention import attention_backend
from megadyn.parallel.grid import make_grid
from megadyn.training import launch
from megadyn.training.data import Data, evaluation_size, open_data
from megadyn.training.engine import Engine, StepResult
from megadyn.training.guard import StopSignal, TrainingDiverged
from megadyn.training.loader import Loader
from megadyn.training.optimizer import learning_rate
from megadyn.training.telemetry import Telemetry


def run(config: Config) -> None:
    """Trains as configured. Every process of the job calls it."""
    engine_settings(config)                # read again by the engine; a mistake in it is to be known before the data are opened
    plan = batch_plan(config, launch.world_size())
    data = open_data(config)
    refuse_early(config, plan, data)
    launch.join()
    engine = Engine(config, plan, make_grid(config.parallel.tensor, config.parallel.pipeline), data.eod)
    job = Job(config, engine, data)
    job.start()
    job.train()
    job.finish()


def refuse_early(config: Config, plan: BatchPlan, data: Data) -> None:
    """Raises UserError for what can be known to fail before the ranks meet."""
    attention_backend(config.model, config.precision)
    for name, samples in (("validation", data.validation), ("test", data.test)):
        if samples is not None:
            evaluation_size(name, samples, config.training.eval_samples, plan)
    resume = config.checkpoint.resume
    checkpoints = Path(config.output_dir) / CHECKPOINTS
    if resume == "never" and any(checkpoints.glob("iteration-*")):
        raise UserError(f"{checkpoints} holds checkpoints and checkpoint.resume is never: "
                        "set checkpoint.resume=auto, or another output_dir")
    if resume not in ("auto", "never"):
        found = resolve(Path(resume))
        save_load.check_same_run(config, read_manifest(found), found)
    if config.checkpoint.init_from:
        HfFolder(Path(config.checkpoint.init_from))
    with os_errors_named(config.output_dir):
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        if not os.access(config.output_dir, os.W_OK):
            raise ConfigError("output_dir", config.output_dir, "a folder that can be written to")


CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints inside its output folder."""


class Job:
    """One run: where it stands, and the steps that `train` calls by name."""

    def __init__(self, config: Config, engine: Engine, data: Data):
        self.config, self.engine, self.data = config, engine, data
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / CHECKPOINTS
        self.iteration = 0
        self.consumed_samples = 0
        self.saved_at = -1
        self.telemetry: Telemetry | None = None              # rank 0's
        self.stop = StopSignal()

    def start(self) -> None:
        """Sets the starting weights and position: a checkpoint's, a Hugging Face folder's, or drawn from the seed."""
        settings = self.config.checkpoint
        found = None
        if settings.resume == "auto":
            found = save_load.newest_good(self.checkpoints)     # raises if there are some and none is good
        elif settings.resume != "never":
            found = resolve(Path(settings.resume))
            if problem := save_load.verify(found):
                raise UserError(problem)
        if found:
            manifest = save_load.load(self.engine, found, None if settings.allow_other_data else self.data.train.key)
            self.iteration, self.consumed_samples = manifest["iteration"], manifest["consumed_samples"]
            self.saved_at = self.iteration
            log.info("resumed from %s", found)
            if self.iteration >= (self.config.training.iterations or 0):
                log.info("nothing to do: the run stands at iteration %d of %d", self.iteration, self.config.training.iterations)
        elif settings.init_from:
            save_load.init_from(self.engine, Path(settings.init_from))
            log.info("weights from %s", settings.init_from)
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.folder / "config.yaml")
            self.telemetry = Telemetry(self.config, dist.get_world_size(), self.folder, self.iteration)
            log.info("%s", run_line(self.config, self.engine))

    def train(self) -> None:
        total = self.config.training.iterations or 0
        if self.iteration == 0:
            self.evaluate("validation", self.data.validation)
        batch = self.engine.plan.global_batch
        end = self.consumed_samples + (total - self.iteration) * batch
        with self.load(self.data.train, self.consumed_samples, end, step=batch) as loader:
            while self.iteration < total:
                if self.step(loader, total):
                    log.info("stopped by %s after iteration %d; start again to go on", self.stop.received or "a signal elsewhere",
                             self.iteration)
                    return

    def step(self, loader: Loader, total: int) -> bool:
        """One step of `total`, and what is due behind it; true if the run was asked to stop."""
        cfg, plan = self.config.training, self.engine.plan
        rate = learning_rate(self.config.optimizer, self.iteration, total)
        result = self.engine.train_step(islice(loader, plan.micro_batches), rate)
        self.iteration += 1
        self.consumed_samples += plan.global_batch
        if self.telemetry:
            self.telemetry.add_wait(loader.take_wait())
        stopping = self.stop.asked()
        if self.due(self.config.logging.interval) or stopping:
            self.report(result, rate)
        if self.due(cfg.eval_interval):
            self.evaluate("validation", self.data.validation)
        if self.iteration == total:
            self.evaluate("test", self.data.test)
        if self.due(self.config.checkpoint.interval) or stopping:
            self.save()
        return stopping

    def load(self, samples: Samples, first: int, end: int, step: int) -> Loader:
        """This rank's micro-batches of samples `first` to `end`; a stage between the first and the last reads none."""
        grid, plan = self.engine.grid, self.engine.plan
        reads = grid.is_first_stage or grid.is_last_stage
        ids = micro_batch_ids(first, end if reads else first, global_batch=step, micro_batch=plan.micro_batch,
                              dp_rank=grid.dp.rank, dp_size=grid.dp.size)
        return Loader(samples, ids, self.engine.device)

    def due(self, interval: int) -> bool:
        """At every `interval`-th iteration and the last; at the last only where `interval` is 0."""
        return self.iteration == self.config.training.iterations or (interval > 0 and self.iteration % interval == 0)

    def report(self, result: StepResult, rate: float) -> None:
        """Metrics of the last step. Raises TrainingDiverged rather than going on with a loss that is no number."""
        self.check_sound()
        routing = self.engine.routing_statistics()
        if self.telemetry:
            self.telemetry.train(self.iteration, consumed_samples=self.consumed_samples, lm_loss=float(result.loss),
                                 grad_norm=float(result.grad_norm), learning_rate=rate, routing=routing)

    def evaluate(self, name: str, samples: Samples | None) -> None:
        """Loss on held-out samples under each routing; a dense model has one, which stands for both."""
        if samples is None:
            return
        plan = self.engine.plan
        size = evaluation_size(name, samples, self.config.training.eval_samples, plan)
        routed = self.config.model.routing.kind != "dense"
        losses = {}
        for mode in ("topk", "causal") if routed else ("topk",):
            with self.load(samples, 0, size, step=size) as loader:
                losses[mode] = self.engine.evaluate(loader, size // (plan.micro_batch * plan.data_parallel), mode)
        losses.setdefault("causal", losses["topk"])
        if self.telemetry:
            self.telemetry.evaluation(self.iteration, name, losses)

    def check_sound(self) -> None:
        if not self.engine.weights_are_sound:
            raise TrainingDiverged(f"a loss was no number by iteration {self.iteration} (samples up to {self.consumed_samples}); "
                                   f"nothing was saved since iteration {max(0, self.saved_at)}")

    def save(self) -> None:
        if self.saved_at != self.iteration:
            self.check_sound()
            folder = save_load.save(self.engine, self.checkpoints, iteration=self.iteration,
                                    consumed_samples=self.consumed_samples, data_key=self.data.train.key)
            self.saved_at = self.iteration
            log.info("saved %s", folder)
        if self.telemetry:
            self.telemetry.restart_clock(self.iteration)

    def finish(self) -> None:
        if self.telemetry:
            self.telemetry.close()
        dist.barrier()
        dist.destroy_process_group()


def run_line(config: Config, engine: Engine) -> str:
    """What runs, in one line."""
    model, grid, training = config.model, engine.grid, config.training
    kind = model.routing.kind if model.routing.kind == "dense" else f"{model.routing.kind} at capacity {model.routing.capacity}"
    return (f"{kind}: {model.num_layers} layers of {model.hidden_size}, {config.precision}, ZeRO-{engine.zero_stage}, "
            f"tensor {grid.tp.size} x pipeline {grid.pp.size} x data {grid.dp.size}; {training.iterations} iterations of "
            f"{training.tokens_per_step:,} tokens ({engine.plan.micro_batches} x {engine.plan.micro_batch} samples a rank)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="megadyn.pretrain", description="Pretrain a routed transformer.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.iterations=20")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)     # the launcher passes it; LOCAL_RANK counts
    launch.adopt_mpi_ranks()
    start_logging()
    try:
        args = parser.parse_args(argv)
        run(load_config(args.config, args.overrides))
    except UserError as error:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        print(f"error: {f'[local rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
