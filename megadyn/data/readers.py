"""Documents from text files, JSON lines, and folders of both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from megadyn.data.files import os_errors_named
from megadyn.errors import UserError

FORMATS = ("auto", "text", "jsonl")
JSONL_SUFFIXES = (".jsonl", ".json")


class DocumentError(Exception):
    """What is wrong with one document; the text begins with its file and line."""


@dataclass
class Corpus:
    """The documents of `paths`, in order; iterating streams them, one document in memory at a time.

    A folder stands for all files below it, sorted by name. A text file is one document, kept to the byte; a JSONL
    file has one a line, under `text_key`, and its blank lines are no documents. `auto` takes `.jsonl` and `.json`
    for JSONL and all else for text.

    A document that cannot be read (no UTF-8, no JSON, no such key, no text) raises `UserError` with its file and
    line number; with `on_error="skip"` it is counted in `skipped` instead. A missing path always raises, at once.
    The folders are listed once, at the start: files that come later, such as the output itself, are not read.
    """

    paths: Sequence[Path]
    form: str = "auto"
    text_key: str = "text"
    on_error: str = "fail"
    skipped: int = field(default=0, init=False)
    """Documents left out in the last pass."""
    first_skipped: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._files: list[Path] = []
        for path in self.paths:
            if not path.exists():
                raise UserError(f"{path}: no such file or folder")
            with os_errors_named(path):
                self._files.extend(files_below(path))

    def __iter__(self) -> Iterator[str]:
        self.skipped, self.first_skipped = 0, None
        for file in self._files:
            with os_errors_named(file):
                yield from self._documents(file)

    def _documents(self, file: Path) -> Iterator[str]:
        is_jsonl = self.form == "jsonl" or (self.form == "auto" and file.suffix in JSONL_SUFFIXES)
        for place, raw in raw_lines(file) if is_jsonl else [(str(file), file.read_bytes())]:
            try:
                text = jsonl_text(place, raw, self.text_key) if is_jsonl else plain_text(place, raw)
            except DocumentError as error:
                if self.on_error != "skip":
                    raise UserError(f"{error} (--on-error skip leaves such documents out)") from error
                self.skipped += 1
                self.first_skipped = self.first_skipped or str(error)
            else:
                yield text


def files_below(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """`path` itself if it is a file, else every file below it, each folder sorted by name."""
    if not path.is_dir():
        yield path
        return
    here = path.resolve()
    if here in above:
        raise UserError(f"{path}: a link that leads back to a folder above it")
    for child in sorted(path.iterdir()):
        yield from files_below(child, (*above, here))


def raw_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line number`, bytes) of each line that is not blank."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield f"{file}:{number}", line


def plain_text(place: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{place}: no UTF-8 text (byte {error.start}: {error.reason})") from error


def jsonl_text(place: str, line: bytes, text_key: str) -> str:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DocumentError(f"{place}: no JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(entry, dict):
        raise DocumentError(f"{place}: no JSON object but {type(entry).__name__}")
    if text_key not in entry:
        raise DocumentError(f"{place}: no key {text_key!r} (its keys: {', '.join(entry) or 'none'})")
    if not isinstance(text := entry[text_key], str):
        raise DocumentError(f"{place}: {text_key!r} holds {type(text).__name__}, no text")
    return text
