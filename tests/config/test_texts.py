"""Every configuration key says what it is."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest

from megadyn.config import Config, Source
from megadyn.kinds import known_kinds, make_kind


def sections(cls: type) -> Iterator[type]:
    """This section and those inside it."""
    yield cls
    for field in fields(cls):
        if is_dataclass(made := field.default_factory() if callable(field.default_factory) else None):
            yield from sections(type(made))


def texts(cls: type) -> dict[str, str]:
    """The string behind each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if not is_dataclass(base):
            continue
        (node,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for line, after in zip(node.body, node.body[1:]):
            is_field = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found.setdefault(line.target.id, str(after.value.value))
    return found


SECTIONS = [*sections(Config), Source, *(type(make_kind(kind)) for kind in known_kinds())]


@pytest.mark.parametrize("section", dict.fromkeys(SECTIONS), ids=lambda section: section.__name__)
def test_every_key_has_a_text(section: type) -> None:
    found = texts(section)
    missing = [field.name for field in fields(section) if field.name != "kind" and not found.get(field.name)]
    assert not missing
