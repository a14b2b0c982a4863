"""Files at an address: written, read back, listed and removed, through fsspec, whatever happens to connections."""

import hashlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megadyn.errors import UserError
from megadyn.prepare.remote import file_system, patiently, protocol_of, shown

CHUNK_BYTES = 2**24
"""Read at once."""
WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory")
"""Protocols in which a folder is the beginning of names. Of some, making one would make a bucket."""

FILES_AT_ONCE = 4

T = TypeVar("T")


class Store:
    """The files below an address, by their names relative to it.

    A failure that may pass is followed by other attempts, a while later. The others, and the last, raise UserError.
    """

    def __init__(self, address: str, moved: Callable[[], None] = lambda: None) -> None:
        """`moved` is called whenever bytes have moved, and from other threads."""
        self.address, self.moved = shown(address), moved
        self._system, root = file_system(address)
        self._root = root.rstrip("/")
        self.here = Path(self._root) if protocol_of(address) in ("file", "local") else None
        """The folder, if it is one of this machine."""
        self._has_folders = protocol_of(address) not in WITHOUT_FOLDERS

    def __str__(self) -> str:
        return self.address

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes of all files below `folder`, by name."""

        def listed() -> dict[str, int]:
            self._system.invalidate_cache()  # what fsspec knows may be from before another machine's writing
            try:
                found = self._system.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            start = f"{self._root}/"
            return {name.removeprefix(start): int(entry["size"]) for name, entry in found.items()}

        return self._patiently(listed, folder)

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""

        def content() -> bytes | None:
            self._system.invalidate_cache()
            try:
                raw: bytes = self._system.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            self.moved()
            return raw

        return self._patiently(content, name)

    def write(self, name: str, content: bytes) -> None:
        """A small file. Raises UserError unless it can be read back."""

        def put() -> None:
            self._make_folder(name)
            self._system.pipe_file(self._path(name), content)

        self._patiently(put, name)
        if self.read(name) != content:
            raise UserError(f"{self}/{name}: what is read back differs from what was written")

    def put(self, file: Path, name: str) -> None:
        """Copies a file there."""
        from fsspec.callbacks import Callback

        def copy() -> None:
            self._make_folder(name)
            if self.here is not None:
                return self._copy_here(file, self.here / name)
            told = Callback(hooks={"moved": lambda *_, **__: self.moved()})
            self._system.put_file(str(file), self._path(name), callback=told)
            self.moved()
            return None

        self._patiently(copy, name)

    def sha256(self, name: str) -> str:
        """Of a file's content as it is read back."""

        def digest() -> str:
            return self._read_through(name, lambda _: None)

        return self._patiently(digest, name)

    def get(self, name: str, file: Path) -> str:
        """Copies a file from there, to disk; returns its sha256."""

        def fetched() -> str:
            with file.open("wb") as out:
                digest = self._read_through(name, lambda chunk: _write(out, chunk))
                out.flush()
                os.fsync(out.fileno())
            return digest

        return self._patiently(fetched, name)

    def remove(self, names: list[str]) -> None:
        """Removes files, and folders that this leaves empty."""
        for name in names:
            self._patiently(partial(self._remove, name), name)
        if self._has_folders:
            for folder in sorted({name.rpartition("/")[0] for name in names} - {""}):
                if not self.sizes(folder):
                    self._patiently(partial(self._system.rmdir, self._path(folder)), folder)

    def _copy_here(self, file: Path, to: Path) -> None:
        """With progress, which fsspec does not tell of here, and to disk."""
        with file.open("rb") as source, to.open("wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                out.write(chunk)
                self.moved()
            out.flush()
            os.fsync(out.fileno())

    def _remove(self, name: str) -> None:
        try:
            self._system.rm_file(self._path(name))
        except FileNotFoundError:  # an earlier attempt removed it
            return

    def _read_through(self, name: str, take: Callable[[bytes], object]) -> str:
        """Hands over the content of a file, piece by piece; returns its sha256."""
        digest = hashlib.sha256()
        with self._system.open(self._path(name), "rb", block_size=CHUNK_BYTES) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                take(chunk)
                self.moved()
        return digest.hexdigest()

    def _make_folder(self, name: str) -> None:
        if self._has_folders:
            self._system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _patiently(self, do: Callable[[], T], name: str) -> T:
        return patiently(do, f"{self}/{name}", advice="")


def _write(file: Any, chunk: bytes) -> None:
    """Raises UserError if this machine cannot write, after which no other attempt helps."""
    try:
        file.write(chunk)
    except OSError as error:
        raise UserError(f"{file.name}: {error.strerror or error}") from None


def in_parallel(do: Callable[[str], Any], names: list[str]) -> list[Any]:
    """`do` of each of some files, several at a time. Raises the first error, and begins no more after it.

    The threads of an executor would be waited for when the process ends, also if a connection hangs.
    """
    left, results, errors = list(names), {}, list[BaseException]()

    def work() -> None:
        while not errors:
            try:
                name = left.pop(0)
            except IndexError:
                return
            try:
                results[name] = do(name)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(FILES_AT_ONCE, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[name] for name in names]
