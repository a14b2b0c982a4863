"""The reference of every configuration key, made from the dataclasses of `megadyn.config` and `megadyn.kinds` at build time.

A field's text is the string below it in the source, so a key is documented where it is declared and nowhere else.
"""

import ast
import inspect
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megadyn.config import Config, ModelConfig
from megadyn.kinds import Kind, find_kind, known_kinds, make_kind

MANDATORY = "???"
"""OmegaConf's mark for a value that a configuration must give."""
ROUTING = "model.routing"


class Key(NamedTuple):
    name: str
    """With its section: `training.seed`."""
    type: str
    default: str
    """As it is written in YAML; `required` for a key without a default."""
    text: str


class Section(NamedTuple):
    title: str
    text: str
    keys: list[Key]


def texts_of(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, those of its bases included. A class's own text wins over its bases'."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if not is_dataclass(base):
            continue
        (node,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for line, after in zip(node.body, node.body[1:], strict=False):
            is_field = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found.setdefault(line.target.id, " ".join(str(after.value.value).split()))
    return found


def type_name(hint: Any) -> str:
    """A type in the words of a YAML file: `int | None` is "integer or null"."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    plain = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", Any: "any"}
    return plain.get(hint) or getattr(hint, "__name__", str(hint))


def section_class(field: Field) -> type | None:
    """The dataclass of a field that is itself a section."""
    made = field.default_factory() if field.default_factory is not MISSING else None
    return type(made) if is_dataclass(made) else None


def default_of(field: Field, settled: Any = None) -> str:
    """A field's default as YAML. `settled`: what a null default comes to, where the class fills it in."""
    value = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING or value == MANDATORY:
        return "required"
    return json.dumps(settled if value in (None, "") else value)


def keys_of(cls: type, prefix: str, settled: object = None) -> list[Key]:
    """Keys of one section, without those of the sections inside it."""
    hints, texts = typing.get_type_hints(cls), texts_of(cls)
    return [
        Key(
            prefix + field.name,
            type_name(hints[field.name]),
            default_of(field, getattr(settled, field.name, None)),
            texts.get(field.name, ""),
        )
        for field in fields(cls)
        if section_class(field) is None
    ]


def sections_of(cls: type, prefix: str = "") -> Iterator[Section]:
    """This section and those inside it, in the order of the source."""
    own = keys_of(cls, prefix)
    if own:
        doc = "" if cls is Config else texts_or_doc(cls)
        yield Section(prefix.rstrip(".") or "Top level", doc, own)
    for field in fields(cls):
        name = prefix + field.name
        inner = section_class(field)
        if name == ROUTING:
            yield from routing_sections()
        elif inner is not None:
            yield from sections_of(inner, f"{name}.")


def texts_or_doc(cls: type) -> str:
    """A class's own docstring; dataclasses without one get their signature from Python, which says nothing here."""
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


def routing_sections() -> Iterator[Section]:
    """`model.routing`: the key that all kinds share, then each kind's own."""
    yield Section(
        ROUTING,
        "`kind` chooses the kind; every kind then has keys of its own. A key that the chosen kind lacks is refused.",
        keys_of(Kind, f"{ROUTING}.", ModelConfig().routing),
    )
    for name in known_kinds():
        cls = find_kind(name)
        own = [key for key in keys_of(cls, f"{ROUTING}.", make_kind(name)) if key.name != f"{ROUTING}.kind"]
        if own:
            yield Section(f"{ROUTING} with kind {name}", cls.sentence, own)


def all_sections() -> list[Section]:
    return list(sections_of(Config))


def as_markdown(sections: list[Section]) -> str:
    lines = [
        "# Configuration reference",
        "",
        "Every key, generated from the source. The [configuration guide](../configuration.md) says how files, overrides and "
        "defaults work together.",
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.text:
            lines += [section.text, ""]
        for key in section.keys:
            shown = "required" if key.default == "required" else f"default `{key.default}`"
            lines += [f"`{key.name}`", f": *{key.type}*, {shown}. {key.text}", ""]
    return "\n".join(lines)


def write(path: Path) -> None:
    """Writes the page, and leaves it untouched if nothing changed, so that a second build is quick."""
    text = as_markdown(all_sections())
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
