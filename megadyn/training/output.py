"""The output folder of a run while it trains: what each start, or phase, writes into it, and what it reports to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megadyn.checkpoint.save_load import PoisonedWeights
from megadyn.config import Config, save_config
from megadyn.engine.engine import Engine
from megadyn.engine.optimizer import schedule_problem
from megadyn.files import os_errors_named
from megadyn.launch.environment import record_start
from megadyn.log import log
from megadyn.telemetry.profile import Windows
from megadyn.telemetry.telemetry import Silent, Telemetry
from megadyn.training.length import schedule_steps
from megadyn.training.loss_rule import TrainingDiverged
from megadyn.training.phases import Part, say_phase
from megadyn.training.state import RunState


@contextmanager
def output_folder(
    whole: Config, part: Part, engine: Engine, state: RunState
) -> Iterator[tuple[Silent, Windows]]:
    """Creates the output folder and opens what the run reports to; closed also if the run fails. The metrics name a divergence
    that ends the run. Collective."""
    config = part.config
    folder, rank, device = Path(config.output_dir), dist.get_rank(), engine.device
    telemetry = Silent()
    with os_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        hosts = record_start(
            folder, engine.grid, engine.zero_stage, device, state.iteration, config.last_iteration
        )
        windows = Windows(config.logging, folder, rank, state.iteration)
        if rank == 0:
            save_config(whole, folder / "config.yaml")
            log.info("%s", engine.run_line())
            say_phase(config, state.iteration)
            if problem := schedule_problem(
                config.optimizer, schedule_steps(config), config.training.tokens_per_step
            ):
                log.warning("%s", problem)
            telemetry = Telemetry(
                config,
                dist.get_world_size(),
                folder,
                state.iteration,
                torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                hosts,
            )
    try:
        yield telemetry, windows
    except (TrainingDiverged, PoisonedWeights) as error:
        telemetry.event(state.iteration, "diverged", {"problem": str(error)})
        raise
    finally:
        windows.finish(state.iteration)
        telemetry.close()
