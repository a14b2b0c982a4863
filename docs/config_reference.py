"""The page with every configuration key, built from the same data as `megadyn config keys`."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from megadyn.config.describe import REQUIRED, ROUTING, Key, keys
from megadyn.kinds import find_kind, make_kind

ABOUT_ROUTING = (
    "`kind` chooses the kind; every kind then has its own keys. A key that the chosen kind lacks is refused."
)


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Title, text and keys of each section: the top level, then as in the source; kinds of routing follow `model.routing`."""

    def place(key: Key) -> tuple[str, str | None]:
        return key.name.rpartition(".")[0], key.kind

    groups = {of: list(found) for of, found in groupby(keys(), place)}
    order = [of for of in groups if of[1] is None and of[0]]
    after = order.index((ROUTING, None)) + 1
    order[after:after] = [of for of in groups if of[1] is not None]
    for section, kind in [("", None), *order]:
        if kind is not None:
            yield f"{section} with kind {kind}", find_kind(kind).sentence, groups[section, kind]
        else:
            about = ABOUT_ROUTING if section == ROUTING else ""
            yield section or "Top level", about, groups[section, None]


def default_of(key: Key) -> str:
    """The default as written in YAML; for a key of a kind, the value that its class fills in for null."""
    if key.default == REQUIRED:
        return "required"
    value = key.default
    if key.kind is not None and value in (None, ""):
        value = getattr(make_kind(key.kind), key.name.rpartition(".")[2])
    return f"default `{json.dumps(value)}`"


def as_markdown() -> str:
    lines = [
        "# Configuration reference",
        "",
        "Every key, generated from the source; `megadyn config keys` prints the same. The "
        "[configuration guide](../configuration.md) says how files, overrides and defaults work together.",
        "",
    ]
    for title, text, found in sections():
        lines += [f"## {title}", ""]
        if text:
            lines += [text, ""]
        for key in found:
            lines += [f"`{key.name}`", f": *{key.type}*, {default_of(key)}. {key.text}", ""]
    return "\n".join(lines)


def write(path: Path) -> None:
    """Writes the page only if it changed, so that a second build is quick."""
    text = as_markdown()
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
