"""The entries of `phases` as they are given: the name, length and keys of each, read and checked one by one."""

from dataclasses import fields
from typing import Any, NamedTuple

from megadyn.checks import at_least
from megadyn.config.data import SET_NAME
from megadyn.config.numbers import COUNTED, count
from megadyn.config.run import Config
from megadyn.errors import ConfigError, did_you_mean

OWN_SCHEDULE = (
    "schedule",
    "warmup_iterations",
    "warmup_tokens",
    "decay_iterations",
    "decay_tokens",
    "decay_shape",
    "learning_rate",
    "min_learning_rate",
)
"""Keys of `optimizer`. A phase that names one has a schedule of its own; the others follow that of the run."""
MAY_CHANGE = (
    "data.train",
    "data.repeat",
    "data.document_mask",
    "training.sequence_length",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.recompute",
    "training.z_loss_weight",
    "training.anneal.capacity",
    "training.anneal.iterations",
    "training.anneal.levels",
    *(f"optimizer.{key}" for key in OWN_SCHEDULE),
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.multipliers.base",
    "optimizer.multipliers.router",
    "optimizer.multipliers.prior",
    "optimizer.muon.momentum",
    "optimizer.muon.multiplier",
    "model.rope.type",
    "model.rope.theta",
    "model.rope.factor",
    "model.rope.original_max_position",
    "model.rope.low_freq_factor",
    "model.rope.high_freq_factor",
    "model.rope.beta_fast",
    "model.rope.beta_slow",
    "model.rope.attention_factor",
)
"""In addition to the keys of `model.routing` that a run may change when it resumes."""
SECTIONS = frozenset(
    ".".join(parts[:end])
    for parts in (name.split(".") for name in MAY_CHANGE)
    for end in range(1, len(parts))
) | {"model.routing"}
UNITS = ("iterations", "tokens", "samples", "share")
"""Keys for the length of a phase; all phases use the same one."""


class Spec(NamedTuple):
    """A phase as it was given."""

    prefix: str
    """Of its keys in errors: `phases[0].`, or nothing for a run without phases."""
    name: str
    unit: str
    amount: float
    changes: dict[str, Any]
    """Dotted name -> value."""


def read_phases(config: Config) -> list[Spec]:
    """Reads names, lengths and keys. Raises UserError for one that is malformed, unknown or may not change."""
    if not config.phases:
        return [Spec("", "run", "share", 1.0, {})]
    may_change = changeable(config)
    specs: list[Spec] = []
    for place, given in enumerate(config.phases):
        key = f"phases[{place}]"
        if not isinstance(given, dict):
            raise ConfigError(
                key, given, f"keys: name, one of {', '.join(UNITS)}, and what the phase changes"
            )
        name = given.get("name")
        if not (isinstance(name, str) and SET_NAME.fullmatch(name)):
            raise ConfigError(f"{key}.name", name, "a name of letters, digits, '.', '_' and '-'")
        if name in [spec.name for spec in specs]:
            raise ConfigError(f"{key}.name", name, "different from those of the other phases")
        unit, amount = _length(key, given)
        if specs and unit != specs[0].unit:
            raise ConfigError(f"{key}.{unit}", amount, f"given as {specs[0].unit}, as of the first phase")
        changes = _flat({word: value for word, value in given.items() if word not in ("name", unit)})
        for word, value in changes.items():
            if word in COUNTED and value is not None:
                changes[word] = count(f"{key}.{word}", value)
            if word not in may_change:
                meant = did_you_mean(word, may_change)
                raise ConfigError(f"{key}.{word}", value, f"left out: a phase cannot change it{meant}")
        specs.append(Spec(f"{key}.", name, unit, amount, changes))
    return specs


def changeable(config: Config) -> list[str]:
    """The keys that a phase of this run may change."""
    routing = config.model.routing
    own = [f.name for f in fields(routing) if f.name != "kind" and f.name not in routing.fixed]
    return [*MAY_CHANGE, *(f"model.routing.{name}" for name in own)]


def _flat(given: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, for the keys in SECTIONS."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        is_section = name in SECTIONS and isinstance(value, dict)
        found |= _flat(value, f"{name}.") if is_section else {name: value}
    return found


def _length(key: str, given: dict[Any, Any]) -> tuple[str, float]:
    """Unit and amount of a phase's length."""
    units = [unit for unit in UNITS if unit in given]
    if len(units) != 1:
        raise ConfigError(key, units, f"a phase with one length: {', '.join(UNITS)}")
    unit, amount = units[0], given[units[0]]
    if unit != "share":
        amount = count(f"{key}.{unit}", amount)
        at_least(f"{key}.{unit}", amount, 1)
    elif isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount <= 1:
        raise ConfigError(f"{key}.share", amount, "a share of the run, above 0 and at most 1")
    return unit, amount
