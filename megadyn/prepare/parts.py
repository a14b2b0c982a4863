"""PREFIX.parts: the encoded units of a job, kept until the dataset is complete.

# For each unit, under a name that is a hash of everything that determines its tokens:
#   NAME.bin    the tokens, back to back, in the dtype of the dataset; removed once they are in joined.bin
#   NAME.len    [D] <i4  number of tokens in each document, may be 0
#   NAME.json   a `Part`; written last, so its presence means that the part is finished
# The dataset as far as it has been joined, so that a job needs hardly more disk space than that:
#   joined.bin  the tokens of the first parts, in order
#   joined.txt  their names, one per line
#   publishing  exists while the dataset's files are being renamed
# Files named .*.tmp are being written; the next run removes what is left of them.

So an interrupted run continues where it stopped, and no run uses a part made from other input.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megadyn.data.indexed import LONGEST_SEQUENCE
from megadyn.data.indexed_writer import write_all
from megadyn.errors import UserError
from megadyn.files import temporary_beside
from megadyn.tokenization.tokenizer import TokenArray

LAYOUT = 1
"""Part of every name; increased whenever the same unit should give different files."""
LOCK = "lock"
CHUNK_BYTES = 2**22
VISIBLE_SECONDS = 120.0
"""Time for files written by one host to become visible on another. NFS by default looks again after at most 60 s."""
POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Part:
    """The result of a unit."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    """Size of the documents' texts in UTF-8."""
    skipped: int
    first_skipped: str | None
    crc32: int
    """Over NAME.bin followed by NAME.len."""


class Parts:
    """The folder of one job; several processes may use it at once."""

    def __init__(self, prefix: Path) -> None:
        self.folder = Path(f"{prefix}.parts")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder and locks out other runs; raises `UserError` if another run has it.

        Afterwards removes the folder if it has no finished part.
        """
        try:
            with lock_in(self.folder):
                for leftover in self.folder.glob(".*.tmp"):
                    leftover.unlink()
                try:
                    yield
                finally:
                    if not any(self.folder.glob("*.json")):
                        self.remove()
        finally:
            with suppress(OSError):
                self.folder.rmdir()  # only if empty: on NFS the lock file stays until it is closed

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for_folder(self, rank: int) -> None:
        """Waits until this rank, `rank`, sees the folder that rank 0 created; raises `UserError` after `VISIBLE_SECONDS`."""
        wait_to_see(self.folder / LOCK, 0, "rank 0", f"rank {rank} on {os.uname().nodename}")

    def wait_for(self, part: Part, itemsize: int, rank: int) -> None:
        """Waits until rank 0, which calls this, sees the files that `rank` wrote; raises `UserError` after `VISIBLE_SECONDS`."""
        for path, size in (
            (self.tokens_file(part), part.tokens * itemsize),
            (self._file(part.name, "len"), part.documents * 4),
        ):
            wait_to_see(path, size, f"rank {rank}", f"rank 0 on {os.uname().nodename}")

    def load(self, name: str) -> Part | None:
        """The finished part of this name; None if there is none or it is damaged."""
        part = self._read(name)
        try:
            return part if part and self.is_sound(part, file_crc(self._file(name, "bin"))) else None
        except FileNotFoundError:
            return None

    def _read(self, name: str) -> Part | None:
        try:
            return Part(**json.loads(self._file(name, "json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def is_sound(self, part: Part, tokens_crc: int) -> bool:
        """Whether the part's lengths, together with tokens of this crc32, are what was written."""
        try:
            return zlib.crc32(self._file(part.name, "len").read_bytes(), tokens_crc) == part.crc32
        except FileNotFoundError:
            return False

    @property
    def joined_tokens(self) -> Path:
        return self.folder / "joined.bin"

    def joined(self, names: Sequence[str], itemsize: int) -> dict[str, Part]:
        """The parts in joined.bin that match the beginning of `names`, in order; later ones are forgotten.

        Readers must check whether their tokens are what was written (`is_sound`).
        """
        found: dict[str, Part] = {}
        if self.joined_tokens.exists() and self._joined_list.exists():
            left = self.joined_tokens.stat().st_size
            for name, listed in zip(
                names, self._joined_list.read_text(errors="replace").split(), strict=False
            ):
                part = self._read(name)
                left -= part.tokens * itemsize if part else 0
                if part is None or name != listed or left < 0 or not self._file(name, "len").exists():
                    break
                found[name] = part
        self._rewrite_joined_list(found)
        return found

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Marks that the dataset's files are being renamed, for `take_back`."""
        self._publishing.touch()
        try:
            yield
        finally:
            self._publishing.unlink()

    def take_back(self, dataset: Mapping[str, Path]) -> None:
        """Undoes the renames of a run that was killed while it published the dataset. The index is renamed last."""
        if self._publishing.exists() and not dataset["idx"].exists():
            if dataset["bin"].exists() and self._joined_list.exists() and not self.joined_tokens.exists():
                dataset["bin"].replace(self.joined_tokens)
            dataset["bin"].unlink(missing_ok=True)
            dataset["json"].unlink(missing_ok=True)
        self._publishing.unlink(missing_ok=True)

    def add_joined(self, part: Part) -> None:
        """Records that joined.bin now includes this part."""
        with self._joined_list.open("a") as file:
            file.write(f"{part.name}\n")
        self.tokens_file(part).unlink()

    def damaged_joined(self, sound: Iterable[str]) -> UserError:
        """Forgets all parts in joined.bin except the intact ones at its beginning, `sound`."""
        self._rewrite_joined_list(sound)
        return UserError(f"{self.joined_tokens}: damaged; the same command continues from its intact part")

    def _rewrite_joined_list(self, names: Iterable[str]) -> None:
        temporary = temporary_beside(self._joined_list)
        temporary.write_text("".join(f"{name}\n" for name in names))
        temporary.replace(self._joined_list)

    @property
    def _publishing(self) -> Path:
        return self.folder / "publishing"

    @property
    def _joined_list(self) -> Path:
        return self.folder / "joined.txt"

    def tokens_file(self, part: Part) -> Path:
        return self._file(part.name, "bin")

    def lengths(self, part: Part) -> NDArray[np.int32]:
        return np.fromfile(self._file(part.name, "len"), "<i4")

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}"


class PartWriter:
    """Writes one part, batch by batch. As a context manager it removes everything unless `finish` was called."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._final = {kind: parts.folder / f"{name}.{kind}" for kind in ("bin", "len", "json")}
        self._temporary = {kind: temporary_beside(path) for kind, path in self._final.items()}
        self._name, self._lengths, self._crc = name, list[NDArray[np.int32]](), 0
        self.tokens = self.documents = self.text_bytes = 0
        self._bin = self._temporary["bin"].open("wb", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def add(self, tokens: TokenArray, lengths: NDArray[Any], text_bytes: int) -> None:
        """Adds a batch of documents: tokens [N] in the dtype of the dataset, and lengths [D]."""
        if lengths.size and lengths.max() > LONGEST_SEQUENCE:
            raise UserError(
                f"a document of {lengths.max()} tokens: the format holds at most {LONGEST_SEQUENCE} in a sequence"
            )
        raw = tokens.view(np.uint8).data
        self._crc = zlib.crc32(raw, self._crc)
        write_all(self._bin, raw)
        self._lengths.append(lengths.astype("<i4"))
        self.tokens += tokens.size
        self.documents += len(lengths)
        self.text_bytes += text_bytes

    def finish(self, skipped: int, first_skipped: str | None) -> Part:
        self._bin.close()
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths]).tobytes()
        self._temporary["len"].write_bytes(lengths)
        part = Part(
            name=self._name,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            skipped=skipped,
            first_skipped=first_skipped,
            crc32=zlib.crc32(lengths, self._crc),
        )
        self._temporary["json"].write_text(json.dumps(asdict(part)))
        for kind, path in self._final.items():
            self._temporary[kind].replace(path)
        return part


def part_name(*what: object) -> str:
    """The name of a part that is determined by `what`, made of plain values."""
    return hashlib.sha256(json.dumps([LAYOUT, *what]).encode()).hexdigest()[:24]


def file_crc(path: Path) -> int:
    crc = 0
    with path.open("rb", 0) as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def wait_to_see(path: Path, size: int, writer: str, reader: str) -> None:
    """Waits until `path` has `size` bytes here; after `VISIBLE_SECONDS` raises `UserError`, which names `writer` and
    `reader`."""
    began = time.monotonic()
    while size_of(path) != size:
        if time.monotonic() - began > VISIBLE_SECONDS:
            raise UserError(
                f"{path}: {writer} has written it, but {reader} does not see all of it within {VISIBLE_SECONDS:g} s; "
                "the output must be on a file system that all hosts share"
            )
        time.sleep(POLL_SECONDS)


def size_of(path: Path) -> int | None:
    """Size in bytes, or None if the file cannot be opened. Opening it makes a network file system ask its server; stat
    does not."""
    try:
        with path.open("rb", 0) as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None


@contextmanager
def lock_in(folder: Path) -> Iterator[None]:
    """Creates `folder` and holds its lock; raises `UserError` if another process holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / LOCK).open("w")
        except FileNotFoundError:  # its previous owner has just removed the folder
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{folder}: another run is writing this dataset; wait for it, or name another output"
                ) from error
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be locked ({error.strerror}); the output must be on a file system with locks "
                    "(Lustre has them if it is mounted with flock)"
                ) from error
            if not is_same_file(folder / LOCK, lock.fileno()):
                continue
            yield
            return


def is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
