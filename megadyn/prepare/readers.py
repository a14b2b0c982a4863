"""A corpus: documents from files, and from folders of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.log import log
from megadyn.prepare.addresses import files_at
from megadyn.prepare.columns import arrow_rows, parquet_rows
from megadyn.prepare.folders import files_below, matches
from megadyn.prepare.formats import Found, Span, json_lines, refused, text_file
from megadyn.prepare.remote import File, RemoteFile, shown
from megadyn.prepare.units import Unit, units_of

READERS: dict[str, Callable[[Span, str], Iterator[Found]]] = {
    "text": text_file,
    "jsonl": json_lines,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "refused": refused,
}
FORMATS = ("auto", "text", "jsonl", "parquet", "arrow")


@dataclass
class Corpus:
    """The documents of `paths`, in order; iterating streams them, one document in memory at a time.

    A folder means all files below it, sorted by name, except hidden ones and metadata (see `folders`); a pattern
    (`*`, `?`, `[a-z]`, `**`) means all that it matches. Addresses (`https://`, `s3://` ...) mean the same elsewhere (see
    `addresses`). A text file is one document, byte for byte. A JSON-lines file has one document per line, under `text_key`;
    blank lines are skipped. A Parquet or Arrow file has one per row, in the column `text_key`. Compressed files are
    decompressed. `auto` detects formats by content and name (see `detect`), and refuses unknown ones.

    A document that cannot be read (not UTF-8, invalid JSON, no such key, not text) raises `UserError` with its file and
    line number. With `on_error="skip"` it is counted in `skipped` instead; everything lost at one damaged place counts
    as one. A missing path always raises, immediately, and so does a remote file that cannot be read.

    Folders are listed once, at the start: files that appear later, such as the output itself, are not read.
    """

    paths: Sequence[Path | str]
    """A string is an address."""
    form: str = "auto"
    text_key: str = "text"
    on_error: str = "fail"
    skipped: int = field(default=0, init=False)
    """Documents skipped in the last pass."""
    first_skipped: str | None = field(default=None, init=False)
    consumed: int = field(default=0, init=False)
    """Bytes on disk read so far in the last pass."""

    def __post_init__(self) -> None:
        self._files: list[File] = []
        left_out: Counter[str] = Counter()
        for path in self.paths:
            if isinstance(path, str):
                self._files.extend(files_at(path, left_out))
                continue
            with os_errors_named(path):
                for found in matches(path):
                    self._files.extend(files_below(found, left_out))
        if left_out:
            log.info(
                "left out of the folders: %s",
                ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items())),
            )

    @property
    def names(self) -> list[str]:
        """Of the paths, for messages and records."""
        return [shown(path) if isinstance(path, str) else str(path) for path in self.paths]

    def leave_out(self, outputs: Sequence[Path]) -> None:
        """Excludes these files, and everything in these folders, from the corpus."""
        gone = {path.resolve() for path in outputs if path.exists()}

        def is_output(file: File) -> bool:
            if isinstance(file, RemoteFile):
                return False
            real = file.resolve()
            return real in gone or not gone.isdisjoint(real.parents)

        if gone:
            self._files = [file for file in self._files if not is_output(file)]

    def units(self) -> list[Unit]:
        """Cuts the corpus into pieces that can be read independently; raises `UserError` for a file of unknown format."""
        with os_errors_named("the corpus"):
            return units_of(self._files, self.form, refuse=self.on_error == "fail")

    def __iter__(self) -> Iterator[str]:
        self.restart()
        for unit in self.units():
            for text in self.read(unit):
                yield text.decode()

    def size(self) -> int:
        """Bytes on disk that a whole pass reads."""
        return sum(span.size for unit in self.units() for span in unit)

    def restart(self) -> None:
        self.skipped, self.first_skipped, self.consumed = 0, None, 0

    def read(self, unit: Unit) -> Iterator[bytes]:
        """The documents of one unit, as UTF-8; adds to `skipped` and `consumed`."""
        for span in unit:
            before = self.consumed
            with os_errors_named(str(span.file)):
                for found, done in READERS[span.form](span, self.text_key):
                    self.consumed = before + done
                    if isinstance(found, bytes):
                        yield found
                    elif self.on_error == "skip":
                        self.skipped += 1
                        self.first_skipped = self.first_skipped or str(found)
                    else:
                        raise UserError(f"{found} (to skip such documents: --on-error skip)")
            self.consumed = before + span.size
