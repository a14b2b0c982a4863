"""The phases of a run: what each may change, how long it is, and the ordinary configuration that it comes to.

A run in phases is a chain of ordinary runs in one output folder. Each phase resumes from the last checkpoint of the one before,
and its configuration has plain keys alone: `training.iterations` is the iteration at which the phase ends. So a chain of
runs by hand, with these configurations, gives the same weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megadyn.checks import at_least
from megadyn.config.anneal import AnnealConfig
from megadyn.config.logging import WINDOWS
from megadyn.config.optimizer import IN_TOKENS
from megadyn.config.phase import Phase
from megadyn.config.phase_specs import OWN_SCHEDULE, Spec, read_phases
from megadyn.config.run import Config
from megadyn.errors import ConfigError, UserError

ANNEAL = "training.anneal."


class Piece(NamedTuple):
    """What one engine trains: a phase, or one level of its capacity."""

    spec: Spec
    """With the piece's own name and changes."""
    config: Config
    """Not checked yet."""
    steps: int
    span: tuple[int, int]
    """Begin and end of the whole phase, in iterations."""


def with_phases(config: Config) -> Config:
    """`config`, which is in parts, checked together with all of them; its length is theirs.

    Raises:
        UserError: for an invalid phase, by its name; for a key that phases exclude.
    """
    specs = read_phases(config)
    _check_run(config, specs)
    if config.model.max_position is None:
        lengths = [spec.changes.get("training.sequence_length") for spec in specs]
        known = [length for length in lengths if isinstance(length, int)]
        config.model.max_position = max([config.training.sequence_length, *known])
    if specs[0].unit != "share":
        config.training.iterations = 1  # until the steps of the phases are counted
    config.checked()
    parts = phase_configs(config)
    _refuse_settled(config, parts)
    total = parts[-1].training.iterations
    config.training.iterations = total
    if config.training.length is not None:
        config.training.length = config.training.length._replace(iterations=total)
    return config


def have_lengths(phases: Sequence[Any]) -> bool:
    """Whether the phases state the length of the run; otherwise each has a share of it."""
    return bool(phases) and "share" not in phases[0]


def phase_configs(config: Config) -> list[Config]:
    """The configuration of each phase of a checked run, with its place in `phase`. A phase that anneals its capacity is several:
    one per level. A run without any is its only one."""
    if not config.is_in_parts:
        return [config]
    pieces = _pieces(config, read_phases(config))
    total = sum(piece.steps for piece in pieces)
    begin, samples, passed = 0, 0, []
    for number, piece in enumerate(pieces, start=1):
        spec, phase, length, _ = piece
        training, end = phase.training, begin + length
        passed.append([spec.name, end, training.global_batch_size, training.sequence_length])
        training.iterations = end
        training.tokens = training.samples = None
        with naming(spec.name):
            phase.optimizer.check_tokens()
        _settle_schedule(piece, pieces)
        for window in WINDOWS:
            if (steps := getattr(phase.logging, window)) and begin >= steps[-1]:
                setattr(phase.logging, window, None)  # recorded in an earlier phase
        with naming(spec.name):
            phase.checked()
        phase.phase = Phase(
            spec.name,
            number,
            len(pieces),
            begin,
            end,
            total,
            samples,
            training.global_batch_size,
            spec.changes,
            list(passed),
        )
        begin, samples = end, samples + length * training.global_batch_size
    return [piece.config for piece in pieces]


def _pieces(config: Config, specs: Sequence[Spec]) -> list[Piece]:
    """Phases, those that anneal the capacity divided into its levels: `NAME.1`, `NAME.2` and so on, and `NAME` for the rest."""
    made = [_merged(config, spec) for spec in specs]
    begin, found = 0, []
    for spec, phase, length in zip(specs, made, _steps(config, specs, made), strict=True):
        span = begin, begin + length
        begin += length
        with naming(spec.name):
            stages = _stages(phase, length)
        if not stages:
            found.append(Piece(spec, phase, length, span))
        kept = {name: value for name, value in spec.changes.items() if not name.startswith(ANNEAL)}
        for place, (capacity, steps) in enumerate(stages, start=1):
            name = spec.name if place == len(stages) else f"{spec.name}.{place}"
            level = spec._replace(name=name, changes=kept | {"model.routing.capacity": capacity})
            one = _merged(config, level)
            one.training.anneal = AnnealConfig()
            found.append(Piece(level, one, steps, span))
    names = [piece.spec.name for piece in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("phases", name, "another name: a level of an annealed capacity has it")
    return found


def _stages(phase: Config, steps: int) -> list[tuple[float, int]]:
    """Capacity and steps of each level of a phase of `steps`; empty if its capacity is constant."""
    if not phase.is_in_parts:
        return []
    routing, anneal = phase.model.routing, phase.training.anneal
    routing.check()  # fills in the default capacity
    anneal.check()
    if not routing.has_capacity:  # nothing to divide; the check of the phase refuses it
        return []
    return anneal.stages(routing.share, steps)


def config_at(configs: Sequence[Config], iteration: int) -> Config:
    """That of the phase which takes the step after `iteration`; the last one's if there is none."""
    return next((one for one in configs if one.phase and iteration < one.phase.end), configs[-1])


@contextmanager
def naming(name: str) -> Iterator[None]:
    """A UserError inside names the phase."""
    try:
        yield
    except UserError as error:
        raise UserError(f"phase {name!r}: {error}") from None


def named(config: Config) -> AbstractContextManager[None]:
    """The same for a phase's configuration; does nothing for that of a run without phases."""
    return naming(config.phase.name) if config.phase else nullcontext()


def _check_run(config: Config, specs: Sequence[Spec]) -> None:
    """Raises ConfigError for keys of the run that do not fit its phases."""
    training = config.training
    given = [name for name in ("iterations", "tokens", "samples") if getattr(training, name) is not None]
    if config.phases and training.anneal.capacity is not None:
        raise ConfigError(
            "training.anneal.capacity",
            training.anneal.capacity,
            "null with phases; give it in the phase that anneals",
        )
    word = _word(config)
    for name in ("epochs", "flops"):
        if (value := getattr(training, name)) is not None:
            raise ConfigError(
                f"training.{name}", value, f"null with {word}: give iterations, tokens or samples"
            )
    if specs[0].unit != "share" and given:
        raise ConfigError(
            f"training.{given[0]}",
            getattr(training, given[0]),
            f"null with phases whose lengths are given as {specs[0].unit}; these make up the run",
        )
    if specs[0].unit == "share":
        if not given:
            raise ConfigError(
                "training.iterations",
                None,
                f"given, or tokens or samples, with {word}{' by share' if config.phases else ''}",
            )
        total = sum(spec.amount for spec in specs)
        if abs(total - 1) > 1e-6:
            raise ConfigError("phases", [spec.amount for spec in specs], "shares that sum to 1")
    for name in ("routing_record", "routing_replay"):
        if (value := getattr(training, name)) is not None:
            raise ConfigError(f"training.{name}", value, f"null with {word}: a recording has one shape")
    if config.optimizer.schedule_tokens is not None:
        raise ConfigError(
            "optimizer.schedule_tokens",
            config.optimizer.schedule_tokens,
            f"null with {word}; optimizer.schedule_end gives the schedule's end in iterations",
        )


def _word(config: Config) -> str:
    """What makes several parts of the run."""
    return "phases" if config.phases else "training.anneal"


def _refuse_settled(config: Config, parts: Sequence[Config]) -> None:
    """Raises ConfigError for what phases set themselves."""
    if config.data.origin:
        raise ConfigError(
            "data.origin", config.data.origin, f"0 with {_word(config)}: it is set for each part"
        )
    mixes = [config.data, *(one.data for one in parts)]
    for source in (source for mix in mixes for source in mix.sources("train")):
        if source.skip or source.order is not None:
            raise ConfigError(
                "data.train",
                source.prefix,
                f"without skip and order with {_word(config)}: parts of a run go on behind what earlier ones used",
            )


def _merged(config: Config, spec: Spec) -> Config:
    """`config` with the keys of a phase, not checked yet."""
    nested: dict[str, Any] = {}
    for name, value in spec.changes.items():
        *sections, key = name.split(".")
        inside = nested
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[key] = value
    train = nested.get("data", {}).pop("train", config.data.train)  # replaced, not merged
    try:
        base = OmegaConf.structured(replace(config, phases=[]))
        made = OmegaConf.to_object(OmegaConf.merge(base, nested))
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise UserError(f"{spec.prefix}{error.full_key}: {reason}") from None
    assert isinstance(made, Config)
    made.data.train = train
    for pair in (*IN_TOKENS.items(), *((tokens, steps) for steps, tokens in IN_TOKENS.items())):
        named_here, other = (f"optimizer.{name}" in spec.changes for name in pair)
        if named_here and not other:  # it replaces the run's own, whichever of the two that is
            setattr(made.optimizer, pair[1], None)
    for key in ("global_batch_size", "sequence_length"):
        at_least(f"{spec.prefix}training.{key}", getattr(made.training, key), 1)
    return made


def _steps(config: Config, specs: Sequence[Spec], made: Sequence[Config]) -> list[int]:
    """The number of steps of each phase: amounts of samples and tokens are rounded up to whole steps."""
    unit, amounts = specs[0].unit, [spec.amount for spec in specs]
    if unit == "share":
        length = config.training.length
        unit = length.unit if length else "iterations"
        whole = length.amount if length else config.training.iterations
        assert whole is not None
        ends = [round(whole * sum(amounts[: k + 1])) for k in range(len(amounts) - 1)] + [int(whole)]
        amounts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    steps = []
    for spec, amount, phase in zip(specs, amounts, made, strict=True):
        batch = phase.training.global_batch_size
        size = {"iterations": 1, "samples": batch, "tokens": batch * phase.training.sequence_length}[unit]
        steps.append(-(-int(amount) // size))
        if steps[-1] < 1:
            raise ConfigError(f"{spec.prefix}{spec.unit}", spec.amount, "more: the phase has no step")
    return steps


def _settle_schedule(piece: Piece, pieces: Sequence[Piece]) -> None:
    """A phase that names a key of the schedule has its own, without a warm-up unless it names one. Lengths in tokens become
    steps, counted in the batches that the run has where they lie."""
    optimizer, changes = piece.config.optimizer, piece.spec.changes
    if any(f"optimizer.{key}" in changes for key in OWN_SCHEDULE):
        optimizer.schedule_begin, optimizer.schedule_end = piece.span
        if not {"optimizer.warmup_iterations", "optimizer.warmup_tokens"} & changes.keys():
            optimizer.warmup_iterations, optimizer.warmup_tokens = 0, None
    elif optimizer.schedule_end is None:
        optimizer.schedule_end = sum(one.steps for one in pieces)
    sizes = [one.config.training.tokens_per_step for one in pieces]
    steps = [one.steps for one in pieces]
    if optimizer.warmup_tokens is not None:
        optimizer.warmup_iterations = steps_of(
            optimizer.warmup_tokens, steps, sizes, optimizer.schedule_begin
        )
    if optimizer.decay_tokens is not None:
        behind = sum(steps) - optimizer.schedule_end
        optimizer.decay_iterations = steps_of(optimizer.decay_tokens, steps[::-1], sizes[::-1], behind)
    optimizer.warmup_tokens = optimizer.decay_tokens = None


def steps_of(tokens: int, steps: Sequence[int], sizes: Sequence[int], skip: int) -> int:
    """The number of steps that consume `tokens`, rounded up, after the first `skip` steps of a run. Its parts have so many
    `steps` of `sizes` tokens; behind its end the last size counts on."""
    found = 0
    for count, size in zip(steps, sizes, strict=True):
        here = max(0, count - skip)
        skip = max(0, skip - count)
        needed = -(-tokens // size)
        if needed <= here:
            return found + needed
        found, tokens = found + here, tokens - here * size
    return found - (-tokens // sizes[-1])
