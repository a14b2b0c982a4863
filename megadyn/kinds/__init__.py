"""The registry of routing kinds. Kinds of other packages are found by entry point or by path."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from megadyn.costs.shape import capacity_count
from megadyn.errors import ConfigError, UserError, did_you_mean
from megadyn.kinds.kind import DENSE, Kind
from megadyn.kinds.laid import Laid, expand_layout
from megadyn.kinds.topk import Capped, TopK

BUILT_IN = (
    "dense",
    "dtf",
    "mod",
    "dtrnet",
    "fixed",
    "nested",
    "subskip",
    "skip_middle",
    "stt",
)
"""Folders next to this file. To add a kind, add its folder and its name here."""

GROUP = "megadyn.kinds"
"""Entry points in this group name packages that contain a kind."""

__all__ = [
    "BUILT_IN",
    "DENSE",
    "GROUP",
    "Capped",
    "Kind",
    "Laid",
    "TopK",
    "capacity_count",
    "expand_layout",
    "find_kind",
    "keys_of",
    "known_kinds",
    "make_kind",
    "module_of",
    "other_kinds_key",
    "settings_of",
]


def known_kinds() -> tuple[str, ...]:
    """Valid values of `model.routing.kind`, apart from paths of packages."""
    return (*BUILT_IN, *_installed())


@cache
def _installed() -> dict[str, str]:
    """Kinds of installed packages: name -> package."""
    return {point.name: point.value for point in entry_points(group=GROUP) if point.name not in BUILT_IN}


@cache
def find_kind(name: str) -> type[Kind]:
    """The class of a kind, given the value of `model.routing.kind`.

    Raises ConfigError for an unknown kind, and UserError for an incomplete one.
    """
    if name in BUILT_IN:
        path = f"{__name__}.{name}"
    elif name in _installed():
        path = _installed()[name]
    elif "." in name:
        path = name
    else:
        raise ConfigError(
            "model.routing.kind",
            name,
            f"one of {', '.join(known_kinds())}, or the path of a package, such as "
            f"my_package.my_kind{did_you_mean(name, known_kinds())}",
        )
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise  # an import inside the kind failed
        raise ConfigError(
            "model.routing.kind", name, f"a kind that can be imported: there is no module {error.name}"
        ) from None
    return checked_kind(module, path)


def checked_kind(module: ModuleType, path: str) -> type[Kind]:
    """`module.KIND`, if it has everything that a kind needs. Otherwise raises UserError, which names what is missing."""
    kind: Any = getattr(module, "KIND", None)
    if not (isinstance(kind, type) and issubclass(kind, Kind) and is_dataclass(kind)):
        raise UserError(f"routing kind {path}: KIND must be a dataclass derived from megadyn.kinds.Kind")
    for name in ("name", "title", "sentence"):
        if not isinstance(getattr(kind, name, None), str):
            raise UserError(f"routing kind {path}: {kind.__name__}.{name} is missing: it must be a string")
    if not kind.layers:
        raise UserError(
            f"routing kind {path}: {kind.__name__}.layers is missing: it must map layer types to classes in layers.py"
        )
    if kind.layer_types is Kind.layer_types:
        raise UserError(
            f"routing kind {path}: {kind.__name__}.layer_types is missing: it must return the type of each layer"
        )
    if unknown := [key for key in kind.recorded if key not in {f.name for f in fields(kind)}]:
        raise UserError(
            f"routing kind {path}: recorded names {unknown[0]!r}, which is not a key of {kind.__name__}"
        )
    for part in ("layers", "exported"):
        if importlib.util.find_spec(f"{module.__name__}.{part}") is None:
            raise UserError(f"routing kind {path}: {part}.py is missing next to its __init__.py")
    return kind


def make_kind(kind: str, **keys: Any) -> Kind:
    """A checked kind configuration: `make_kind("mod", capacity=0.25)`. Raises ConfigError for keys that the kind lacks."""
    found = find_kind(kind)
    if foreign := next((key for key in keys if key not in keys_of(found)), None):
        raise ConfigError(
            f"model.routing.{foreign}", keys[foreign], f"left out: {other_kinds_key(kind, foreign)}"
        )
    made = found(kind=kind, **keys)
    made.check()
    return made


def keys_of(kind: type[Kind]) -> Sequence[str]:
    """Keys of `model.routing` for a kind."""
    return [f.name for f in fields(kind)]


def settings_of(name: str) -> dict[str, dict[str, Any]]:
    """Settings of `model.routing` that tests and the soak try: a kind's defaults, its other causal rules, and its variants."""
    kind = find_kind(name)
    rules = kind.rules[1:] if "causal" in keys_of(kind) else ()
    return {
        "default": {},
        **{rule: {"causal": rule} for rule in rules},
        **{variant: dict(keys) for variant, keys in kind.variants.items()},
    }


def other_kinds_key(kind: str, key: str) -> str:
    """Explains why `model.routing.KEY` is refused: which kinds have it, or which key might be meant."""
    owners = [name for name in known_kinds() if key in keys_of(find_kind(name))]
    verb = "has" if len(owners) == 1 else "have"
    has = f" ({', '.join(owners)} {verb})" if owners else ""
    every = {known for name in known_kinds() for known in keys_of(find_kind(name))}
    return f"routing kind {kind} has no such key{has}{'' if owners else did_you_mean(key, sorted(every))}"


def module_of(kind: type[Kind], part: str) -> ModuleType:
    """Imports `layers` or `exported` of a kind. Done on demand, because both need torch."""
    return importlib.import_module(f"{kind.__module__}.{part}")
