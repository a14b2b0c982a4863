"""Lists all keys of a configuration: name, type, default and text of each, read from the dataclasses and their docstrings."""

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from megadyn.config.file import EXTENDS
from megadyn.config.numbers import COUNTED
from megadyn.config.run import Config
from megadyn.errors import UserError, did_you_mean
from megadyn.kinds import Kind, find_kind, known_kinds

REQUIRED = "???"
"""OmegaConf's notation for a value that must be given."""
ROUTING = "model.routing"
NAMES = {int: "integer", float: "number", bool: "boolean", str: "string", Any: "any", NoneType: "null"}
"""Names of types in JSON Schema and YAML."""


@dataclass(frozen=True)
class Key:
    """One key of the configuration."""

    name: str
    """Full name: `training.seed`."""
    hint: Any
    """Python type."""
    default: Any
    """A plain value; `REQUIRED` if there is none."""
    text: str
    """What it is, its unit, when to change it."""
    kind: str | None = None
    """For `model.routing.*`: the kind of routing that has this key."""

    @property
    def type(self) -> str:
        """The type in words: `integer or null`, `list of number`."""
        return type_name(self.hint)


def type_name(hint: Any) -> str:
    if getattr(hint, "__origin__", None) is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if getattr(hint, "__origin__", None) is dict:
        return f"mapping of {' to '.join(type_name(part) for part in get_args(hint))}"
    return NAMES[hint] if hint in NAMES else " or ".join(type_name(part) for part in get_args(hint))


@cache
def texts(cls: type) -> dict[str, str]:
    """The docstring after each field of a dataclass, on one line; includes inherited fields."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if not is_dataclass(base):
            continue
        (node,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for line, after in zip(node.body, node.body[1:]):
            match line, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found.setdefault(name, " ".join(text.split()))
    return found


def keys(section: str = "") -> list[Key]:
    """All keys of `section` (default: of the whole configuration). `model.routing` includes the keys of every known kind.

    Args:
        section: name of a section (`training`, `model.routing`) or of one key.

    Raises:
        UserError: there is no such section or key.
    """
    every = [*_keys_of(Config, ""), *(key for kind in known_kinds() for key in kind_keys(kind))]
    found = [key for key in every if not section or f"{key.name}.".startswith(f"{section}.")]
    if not found:
        known = {key.name for key in every} | {key.name.rpartition(".")[0] for key in every}
        raise UserError(f"{section}: no such section or key{did_you_mean(section, known)}")
    return found


def kind_keys(kind: str) -> list[Key]:
    """Keys of `model.routing` for a kind, except `kind` itself."""
    found = find_kind(kind)
    return [_key(found, f, ROUTING, kind) for f in fields(found) if f.name != "kind"]


def _keys_of(section: type, name: str) -> Iterator[Key]:
    for f in fields(section):
        inner = section_of(f)
        full = f"{name}.{f.name}".lstrip(".")
        if full == ROUTING:
            yield _key(Kind, next(f for f in fields(Kind) if f.name == "kind"), ROUTING, default="dense")
        elif inner:
            yield from _keys_of(inner, full)
        else:
            yield _key(section, f, name)


def section_of(f: "Field[Any]") -> type | None:
    """The dataclass in a field; None for a plain key."""
    made = default_of(f)
    return type(made) if is_dataclass(made) else None


def default_of(f: "Field[Any]") -> Any:
    """The default of a field, which every key has; `REQUIRED` means none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def _key(cls: type, f: "Field[Any]", section: str, kind: str | None = None, default: Any = MISSING) -> Key:
    if default is MISSING:
        default = default_of(f)
    name = f"{section}.{f.name}".lstrip(".")
    return Key(name, get_type_hints(cls)[f.name], default, texts(cls).get(f.name, ""), kind)


# ---- JSON Schema

REFERENCE = {"type": "string", "pattern": r"\$\{"}
"""`${training.seed}`: a reference to another key, which is valid for any key."""
COUNT = {"type": "string", "pattern": r"^[0-9.][0-9_,.eE+]*\s*[kKmMbBtT]?$"}
"""`300B`: valid for the keys in COUNTED, in addition to numbers."""


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a configuration file. No key is required, because a file may extend another."""
    paths = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    extends = {EXTENDS: paths | {"description": "Files that this one builds on, relative to its folder."}}
    whole = _section_schema(Config, "")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megadyn configuration",
        **whole,
        "properties": extends | whole["properties"],
    }


def _section_schema(section: type, name: str) -> dict[str, Any]:
    properties = {}
    for f in fields(section):
        full = f"{name}.{f.name}".lstrip(".")
        inner = section_of(f)
        if full == ROUTING:
            properties[f.name] = _routing_schema()
        elif inner:
            properties[f.name] = _section_schema(inner, full)
        else:
            properties[f.name] = _value_schema(_key(section, f, name))
            continue
        properties[f.name]["description"] = texts(section).get(f.name, "")
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _routing_schema() -> dict[str, Any]:
    """Keys of all kinds. If the file names a known kind, only that kind's keys; for another package's kind, any keys."""
    (kind,) = keys(f"{ROUTING}.kind")
    of_kinds = {name: kind_keys(name) for name in known_kinds()}
    properties: dict[str, Any] = {"kind": _value_schema(kind)}
    for name in sorted({key.name for every in of_kinds.values() for key in every}):
        same = [key for every in of_kinds.values() for key in every if key.name == name]
        short = name.rpartition(".")[2]
        described = [
            f"{', '.join(key.kind or '' for key in group)}: {text}" for text, group in _by_text(same)
        ]
        hints = list({str(key.hint): _value_schema(key)["anyOf"] for key in same}.values())
        options = [option for one in hints for option in one]
        unique = [option for i, option in enumerate(options) if option not in options[:i]]
        properties[short] = {"anyOf": unique, "description": " ".join(described)}

    def only(names: Sequence[str]) -> dict[str, Any]:
        return {"propertyNames": {"enum": ["kind", *names]}}

    def names_of(some: Sequence[Key]) -> list[str]:
        return [key.name.rpartition(".")[2] for key in some]

    def where(value: dict[str, Any]) -> dict[str, Any]:
        return {"required": ["kind"], "properties": {"kind": value}}

    cases = [{"if": where({"const": name}), "then": only(names_of(some))} for name, some in of_kinds.items()]
    foreign = {"if": where({"pattern": r"\."}), "else": only(sorted(properties.keys() - {"kind"}))}
    return {"type": "object", "properties": properties, "allOf": [*cases, foreign]}


def _by_text(some: Sequence[Key]) -> list[tuple[str, list[Key]]]:
    groups: dict[str, list[Key]] = {}
    for key in some:
        groups.setdefault(key.text, []).append(key)
    return list(groups.items())


def _value_schema(key: Key) -> dict[str, Any]:
    options = [*_options(key.hint), REFERENCE, *([COUNT, {"type": "number"}] if key.name in COUNTED else [])]
    found: dict[str, Any] = {"anyOf": options, "description": key.text}
    if key.default != REQUIRED:
        found["default"] = key.default
    return found


def _options(hint: Any) -> list[dict[str, Any]]:
    if getattr(hint, "__origin__", None) is list:
        return [{"type": "array", "items": {"anyOf": _options(get_args(hint)[0])}}]
    if getattr(hint, "__origin__", None) is dict:
        return [{"type": "object", "additionalProperties": {"anyOf": _options(get_args(hint)[1])}}]
    if hint is Any:
        return [{}]
    return (
        [{"type": NAMES[hint]}]
        if hint in NAMES
        else [one for part in get_args(hint) for one in _options(part)]
    )
