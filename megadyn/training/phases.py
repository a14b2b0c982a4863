"""Opens and checks the data of every phase before the first step, and says which phase a run goes on with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megadyn.checkpoint import layout
from megadyn.checkpoint.same_run import check_phases
from megadyn.checkpoint.save_load import verify
from megadyn.checkpoint.start import likely_start
from megadyn.config import BatchPlan, Config, batch_plan, config_at, engine_settings, named, phase_configs
from megadyn.errors import UserError
from megadyn.launch.watchdog import Watchdog
from megadyn.log import log
from megadyn.training.data import Data, open_data
from megadyn.training.length import Position
from megadyn.training.preflight import expected_start, refuse_early, refuse_start
from megadyn.training.streams import Streams


class Part(NamedTuple):
    """A phase, or a whole run without phases, ready to begin."""

    config: Config
    plan: BatchPlan
    data: Data

    @property
    def is_last(self) -> bool:
        return self.config.phase is None or self.config.phase.is_last


def open_parts(config: Config, world_size: int) -> list[Part]:
    """The parts of a run, opened and checked before the ranks meet. Fills in what follows from the data, in `config` too.

    Raises:
        UserError: for what any of the parts would refuse, by the name of the phase.
    """
    configs, start, streams = phase_configs(config), expected_start(config), Streams()
    now = config_at(configs, start.iteration)
    if known := likely_start(config.checkpoint, Path(config.output_dir) / layout.CHECKPOINTS):
        check_phases(now, known[1], known[0])  # before their data are opened at positions that are not theirs
    parts: list[Part] = []
    for one in configs:
        if parts:
            one.tokenizer, one.model.vocab_size = parts[0].config.tokenizer, parts[0].config.model.vocab_size
        with named(one):
            # The engine reads this again; check it before the data are opened.
            engine_settings(one)
            plan = batch_plan(one, world_size)
            data = open_part(one, start if one is now else None, streams)
            refuse_early(one, plan, data)
            if one is now:
                refuse_start(one, data)
        parts.append(Part(one, plan, data))
    config.tokenizer, config.model.vocab_size = parts[0].config.tokenizer, parts[0].config.model.vocab_size
    return parts


def open_part(config: Config, start: Position | None, streams: Streams) -> Data:
    """Opens the data of a phase, or of a run without phases. `start`: where the run goes on, if that is in it."""
    if config.phase is None:
        return open_data(config, start or Position())
    streams.settle(config)
    data = open_data(config, start or Position(config.phase.begin, config.phase.samples))
    streams.use(config, data.train)
    return data


def part_at(parts: Sequence[Part], iteration: int) -> int:
    """Which of the parts takes the step after `iteration`."""
    config = config_at([part.config for part in parts], iteration)
    return next(place for place, part in enumerate(parts) if part.config is config)


def end_of_phase_before(part: Part, root: Path, watchdog: Watchdog) -> Path:
    """The checkpoint that the phase before `part` has just ended with, also if its last step was bad. Collective.

    Raises:
        UserError: it is damaged.
    """
    assert part.config.phase is not None
    found = root / layout.folder_name(part.config.phase.begin)
    watchdog.progress("verifying checkpoints")
    if problem := verify(found):
        raise UserError(problem)
    return found


def say_phase(config: Config, iteration: int) -> None:
    """Says which phase the run is in."""
    if (phase := config.phase) is not None:
        what = "begins" if iteration == phase.begin else "goes on"
        training = config.training
        log.info(
            "%s, %s: iterations %d to %d, steps of %d x %d tokens",
            phase,
            what,
            iteration + 1,
            phase.end,
            training.global_batch_size,
            training.sequence_length,
        )


def phase_record(config: Config) -> dict[str, Any]:
    """The event at the begin of a phase."""
    phase, training = config.phase, config.training
    assert phase is not None
    return {
        "name": phase.name,
        "number": phase.number,
        "begin": phase.begin,
        "end": phase.end,
        "global_batch_size": training.global_batch_size,
        "sequence_length": training.sequence_length,
        "changes": phase.changes,
    }
