"""Checks for failures that can be foreseen before the engine is built, to save minutes of waiting."""

import os
from pathlib import Path

import torch.distributed as dist

from megadyn.checkpoint import layout
from megadyn.checkpoint.same_run import check_same_run
from megadyn.checkpoint.start import likely_start
from megadyn.config import BatchPlan, Config
from megadyn.config.logging import WINDOWS
from megadyn.errors import ConfigError, UserError
from megadyn.files import os_errors_named
from megadyn.hf.source import open_source
from megadyn.kernels.rule import kernel_choice
from megadyn.launch import launch
from megadyn.log import log
from megadyn.model.attention import attention_backend
from megadyn.model.compiled import check_compiler
from megadyn.network import choosing_layers
from megadyn.routing.replay import refuse_replay
from megadyn.telemetry.sinks import refuse_wandb, refuse_wandb_login
from megadyn.training.checkpoints import starting_weights
from megadyn.training.data import Data, evaluation_size
from megadyn.training.length import Position
from megadyn.training.task_process import refuse_without_package


def refuse_early(config: Config, plan: BatchPlan, data: Data) -> None:
    """Raises UserError for failures that can be foreseen before the ranks meet, wherever the run starts."""
    launch.check_precision(config.precision)
    attention_backend(config.model, config.precision)
    kernel_choice(config.training.kernels)
    if config.training.compile:
        check_compiler()
    refuse_wandb(config.logging)
    refuse_without_package(config.training.tasks)
    refuse_windows(config)
    for name, samples in (*data.validations.items(), ("test", data.test)):
        if samples is not None:
            wanted = config.training.eval_samples
            size = evaluation_size(name, samples, wanted, plan)
            if size < wanted:
                log.info(
                    "evaluations on the %s set use %d samples (%d wanted, %d available, in rounds of %d)",
                    name,
                    size,
                    wanted,
                    len(samples),
                    plan.micro_batch * plan.data_parallel,
                )


def refuse_windows(config: Config) -> None:
    """Raises ConfigError for steps that cannot be recorded."""
    logging = config.logging
    if (steps := logging.memory_snapshot_steps) and not launch.is_on_gpu():
        raise ConfigError(
            "logging.memory_snapshot_steps", steps, "null on a CPU: torch records the memory of GPUs alone"
        )
    for name in WINDOWS:
        if not (steps := getattr(logging, name)):
            continue
        if max(logging.profile_ranks) >= launch.world_size():
            raise ConfigError(
                "logging.profile_ranks",
                logging.profile_ranks,
                f"below {launch.world_size()}, the number of processes",
            )
        if steps[0] > config.last_iteration:
            raise ConfigError(
                f"logging.{name}", steps, f"steps of the run, which has {config.last_iteration}"
            )


def refuse_start(config: Config, data: Data) -> None:
    """Raises UserError if the run cannot start where it most likely will, or cannot write."""
    checkpoints = Path(config.output_dir) / layout.CHECKPOINTS
    if config.checkpoint.resume == "never" and any(checkpoints.glob("iteration-*")):
        raise UserError(
            f"{checkpoints} holds checkpoints, but checkpoint.resume is never: "
            "set checkpoint.resume=auto, or another output_dir"
        )
    if start := likely_start(config.checkpoint, checkpoints):
        check_same_run(config, start[1], start[0])
    elif config.checkpoint.init_from:
        open_source(starting_weights(config.checkpoint), config.model, config.training.sequence_length)
    if config.training.routing_record is not None or config.training.routing_replay is not None:
        refuse_replay(config, choosing_layers(config.model), data.train.key, expected_start(config).iteration)
    make_output_dir(config)


def make_output_dir(config: Config) -> None:
    """Raises UserError if it cannot be made, or written."""
    with os_errors_named(config.output_dir):
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        if not os.access(config.output_dir, os.W_OK):
            raise ConfigError("output_dir", config.output_dir, "a writable folder")


def expected_start(config: Config) -> Position:
    """The position from which the run will most likely continue. What depends on it is checked again after loading."""
    start = likely_start(config.checkpoint, Path(config.output_dir) / layout.CHECKPOINTS)
    return Position(start[1]["iteration"], start[1]["consumed_samples"]) if start else Position()


def refuse_login(config: Config) -> None:
    """Raises UserError on every rank if W&B is enabled without a login. Collective, but only rank 0 asks the service."""
    if config.logging.wandb != "online":
        return
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            refuse_wandb_login(config.logging)
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])
