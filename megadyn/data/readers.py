"""A corpus: documents from files, and from folders of them."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megadyn.data.files import os_errors_named
from megadyn.data.formats import READERS
from megadyn.data.units import Unit, units_of
from megadyn.errors import UserError

FORMATS = ("auto", *READERS)


@dataclass
class Corpus:
    """The documents of `paths`, in order; iterating streams them, one document in memory at a time.

    A folder stands for all files below it, sorted by name; a pattern (`*`, `?`, `[a-z]`, `**`) for all that it
    matches. A text file is one document, kept to the byte; a JSONL file has one a line, under `text_key`, and its
    blank lines are no documents; a Parquet file has one a row, in the column `text_key`. `.gz` and `.zst` files are
    decompressed. `auto` takes `.jsonl` and `.json` for JSONL, `.parquet` for Parquet and all else for text.

    A document that cannot be read (no UTF-8, no JSON, no such key, no text) raises `UserError` with its file and
    line number; with `on_error="skip"` it is counted in `skipped` instead, and so is, as one, what is lost of a
    damaged file. A missing path always raises, at once.
    The folders are listed once, at the start: files that come later, such as the output itself, are not read.
    """

    paths: Sequence[Path]
    form: str = "auto"
    text_key: str = "text"
    on_error: str = "fail"
    skipped: int = field(default=0, init=False)
    """Documents left out in the last pass."""
    first_skipped: str | None = field(default=None, init=False)
    consumed: int = field(default=0, init=False)
    """Bytes on disk that the last pass has read so far."""

    def __post_init__(self) -> None:
        self._files: list[Path] = []
        for path in self.paths:
            with os_errors_named(path):
                for found in matches(path):
                    self._files.extend(files_below(found))

    def leave_out(self, outputs: Sequence[Path]) -> None:
        """Takes these files, and what lies below these folders, for no part of the corpus."""
        gone = {path.resolve() for path in outputs if path.exists()}

        def is_output(file: Path) -> bool:
            real = file.resolve()
            return real in gone or not gone.isdisjoint(real.parents)

        if gone:
            self._files = [file for file in self._files if not is_output(file)]

    def units(self) -> list[Unit]:
        """The corpus cut into pieces that can be read apart."""
        with os_errors_named("the corpus"):
            return units_of(self._files, self.form)

    def __iter__(self) -> Iterator[str]:
        self.restart()
        for unit in self.units():
            for text in self.read(unit):
                yield text.decode()

    def restart(self) -> None:
        self.skipped, self.first_skipped, self.consumed = 0, None, 0

    def read(self, unit: Unit) -> Iterator[bytes]:
        """The documents of one unit, as UTF-8; goes on counting in `skipped` and `consumed`."""
        for span in unit:
            before = self.consumed
            with os_errors_named(span.file):
                for found, done in READERS[span.form](span, self.text_key):
                    self.consumed = before + done
                    if isinstance(found, bytes):
                        yield found
                    elif self.on_error == "skip":
                        self.skipped += 1
                        self.first_skipped = self.first_skipped or str(found)
                    else:
                        raise UserError(f"{found} (--on-error skip leaves such documents out)")
            self.consumed = before + span.size


def matches(path: Path) -> list[Path]:
    """`path` itself, or if there is none, what it matches as a pattern, sorted by name."""
    if path.exists():
        return [path]
    found = {Path(name) for name in glob.glob(str(path), recursive=True)}
    if not found:
        raise UserError(f"{path}: no such file or folder")
    return sorted(match for match in found if found.isdisjoint(match.parents))      # a folder stands for what is in it


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
