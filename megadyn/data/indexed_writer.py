"""Writes Megatron-LM's indexed format (described in `indexed`). Files appear under their final names only when complete."""

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megadyn.data.indexed import (
    CODE_OF_DTYPE,
    COPY_BYTES,
    HEADER,
    LONGEST_SEQUENCE,
    MAGIC,
    VERSION,
    IndexedDataset,
    files_of,
)
from megadyn.data.record import Record
from megadyn.errors import UserError
from megadyn.files import temporary_beside
from megadyn.tokenization.tokenizer import TokenArray


class IndexedWriter:
    """Streams documents to PREFIX. A context manager that publishes nothing unless `finish` was called.

        with IndexedWriter(prefix, dtype_for(vocab_size)) as writer:
            writer.add(tokens, lengths, sequences)
            writer.finish()

    Until then everything is under temporary names in the same folder, or in `scratch` on the same file system, and
    existing files under PREFIX are not touched. With `tokens`, the tokens are written to that file. It is kept even if
    `finish` is not called, and `add_kept` can reuse what it contains at the start.
    """

    def __init__(
        self, prefix: str | Path, dtype: DTypeLike, scratch: Path | None = None, tokens: Path | None = None
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self._code = CODE_OF_DTYPE[self.dtype]
        self._final = files_of(Path(prefix))
        self._temporary = {
            kind: temporary_beside(scratch / path.name if scratch else path)
            for kind, path in self._final.items()
        }
        self._hash = hashlib.sha256()
        self._lengths: list[NDArray[np.int32]] = []
        self._sequences: list[NDArray[np.int64]] = []  # number per document
        self._final["bin"].parent.mkdir(parents=True, exist_ok=True)
        self._buffer = memoryview(bytearray(COPY_BYTES))
        self._kept = tokens is not None
        if tokens:
            self._temporary["bin"] = tokens
            tokens.touch()
        self._bin = self._temporary["bin"].open("r+b" if tokens else "wb", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for which, path in self._temporary.items():
            if which != "bin" or not self._kept:
                path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Hash of the token stream so far."""
        return self._hash.hexdigest()

    def add(self, tokens: TokenArray, lengths: ArrayLike, sequences: ArrayLike) -> None:
        """Appends documents.

        tokens [N]: ids of any integer type; raises `UserError` if one does not fit the dtype.
        lengths [S]: tokens in each sequence; raises `UserError` if one is over `LONGEST_SEQUENCE`.
        sequences [D]: sequences in each document, 0 for an empty one.
        """
        lengths, sequences = np.asarray(lengths, np.int64), np.asarray(sequences, np.int64)
        if lengths.sum() != len(tokens) or sequences.sum() != len(lengths):
            raise ValueError(
                f"{len(tokens)} tokens for lengths with sum {lengths.sum()}, {len(lengths)} lengths for "
                f"documents with {sequences.sum()} sequences in total"
            )
        if tokens.size:
            low, high, holds = int(tokens.min()), int(tokens.max()), np.iinfo(self.dtype)
            if low < holds.min or high > holds.max:
                raise UserError(
                    f"token id {low if low < holds.min else high} does not fit the dataset's {self.dtype}"
                )
        self._write(np.ascontiguousarray(tokens, self.dtype).view(np.uint8).data)
        self._add_counts(lengths, sequences)

    def add_dataset(self, dataset: IndexedDataset, copied: Callable[[int], None] | None = None) -> None:
        """Appends a whole dataset of the same dtype: a copy of its bytes. `UserError` if they change meanwhile.

        `copied` is told of bytes as they are written.
        """
        if dataset.dtype != self.dtype:
            raise ValueError(f"{dataset.dtype} tokens cannot be copied among {self.dtype} ones")
        self.add_file(files_of(dataset.prefix)["bin"], dataset.sizes, np.diff(dataset.document_index), copied)

    def add_file(
        self,
        path: Path,
        lengths: NDArray[np.int32],
        sequences: NDArray[np.int64],
        copied: Callable[[int], None] | None = None,
    ) -> None:
        """Appends documents (see `add`) whose tokens are those in `path`, in the dtype of the dataset already.

        If that fails, for example because the disk is full, none of them has been appended.
        """
        before = self._bin.tell()
        try:
            with path.open("rb", 0) as tokens:
                self._copy(tokens, copied)
            if self._bin.tell() - before != self._bytes_of(lengths):
                raise UserError(f"{path}: changed while it was copied")
        except BaseException:
            self._bin.truncate(before)
            raise
        # Starts writing to disk now, without dropping unwritten data. Otherwise all of it would be written at the end.
        os.posix_fadvise(self._bin.fileno(), before, self._bin.tell() - before, os.POSIX_FADV_DONTNEED)
        self._add_counts(lengths, sequences)

    def add_kept(self, lengths: NDArray[np.int32], sequences: NDArray[np.int64]) -> int:
        """Appends documents (see `add`) whose tokens come next in the kept `tokens` file; returns the crc32 of these tokens."""
        left, crc = self._bytes_of(lengths), 0
        while left and (size := self._bin.readinto(self._buffer[:left])):
            self._hash.update(self._buffer[:size])
            crc = zlib.crc32(self._buffer[:size], crc)
            left -= size
        self._add_counts(lengths, sequences)
        return crc

    def _copy(self, tokens: io.FileIO, copied: Callable[[int], None] | None) -> None:
        while size := tokens.readinto(self._buffer):
            self._write(self._buffer[:size])
            if copied:
                copied(size)

    def _write(self, raw: memoryview) -> None:
        self._hash.update(raw)
        write_all(self._bin, raw)

    def _bytes_of(self, lengths: NDArray[np.int32]) -> int:
        return int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize

    def _add_counts(self, lengths: NDArray[Any], sequences: NDArray[np.int64]) -> None:
        if lengths.size and lengths.max() > LONGEST_SEQUENCE:
            raise UserError(
                f"a document of {lengths.max()} tokens: the format holds at most {LONGEST_SEQUENCE} in a sequence"
            )
        self._lengths.append(lengths.astype("<i4"))
        self._sequences.append(sequences)
        self.num_tokens += int(lengths.sum(dtype=np.int64))
        self.num_sequences += len(lengths)
        self.num_documents += len(sequences)

    def finish(self, record: Record | None = None) -> None:
        """Publishes the dataset: `.bin`, then `.json` if there is a `record`, and `.idx` last."""
        self._bin.truncate()
        sync_and_close(self._bin)
        with self._temporary["idx"].open("wb") as index:
            self._write_index(index)
            sync_and_close(index)
        if record:
            with self._temporary["json"].open("wb") as file:
                file.write(record.to_json())
                sync_and_close(file)
        publish(self._temporary, self._final)

    def _write_index(self, index: IO[bytes]) -> None:
        lengths = concatenated(self._lengths, "<i4")
        offsets = np.zeros(len(lengths) + 1, "<i8")
        np.cumsum(lengths, out=offsets[1:])
        offsets *= self.dtype.itemsize
        boundaries = np.zeros(self.num_documents + 1, "<i8")
        np.cumsum(concatenated(self._sequences, "<i8"), out=boundaries[1:])
        index.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(boundaries)))
        for array in (lengths, offsets[:-1], boundaries):
            index.write(array.data)


def concatenated(parts: Sequence[NDArray[Any]], dtype: str) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])


def write_all(file: io.FileIO, raw: memoryview) -> None:
    """Repeats writes that were cut short, which happens above 2 GB or when the disk is nearly full."""
    while raw:
        raw = raw[file.write(raw) :]


def sync_and_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def publish(temporary: dict[str, Path], final: dict[str, Path]) -> None:
    """Renames each existing temporary file. On an error renames them back, so that no part of the dataset has a final
    name."""
    final["idx"].unlink(missing_ok=True)  # an old index with new tokens would look like a dataset
    try:
        for kind, path in final.items():
            if temporary[kind].exists():
                temporary[kind].replace(path)
            else:
                path.unlink(missing_ok=True)  # the record of the previous dataset
    except BaseException:
        for kind, path in final.items():
            if temporary[kind].exists():
                path.unlink(missing_ok=True)  # a file of the previous dataset
            elif path.exists():
                path.replace(temporary[kind])
        raise
