"""Documents of one file, or of a part of it: text, JSON lines, Parquet; `.gz` and `.zst` are decompressed.

Each reader yields (what was found, bytes on disk read so far) and stops at the end of its `Span`. A document is its text
as UTF-8. One that cannot be read is found as a `DocumentError`; so is, as one, what is lost of a damaged file. None holds more in
memory than a document or a few megabytes.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

JSONL_SUFFIXES = (".jsonl", ".json")
CODECS = {".gz": "gzip", ".zst": "zstd"}
LONGEST_DOCUMENT = 2**30
"""Bytes; a longer line or text is refused, because a document is held in memory."""
BUFFER_BYTES = 2**20
DECOMPRESSED_BYTES = 2**16
"""Asked for at a time; where a file is damaged, what was asked for last is lost."""
PARQUET_BATCH_BYTES = 2**22


class DocumentError(Exception):
    """What is wrong with a document; the text begins with its file, and line or row."""


@dataclass(frozen=True)
class Span:
    """A part of a file that can be read on its own: those documents that begin in it."""

    file: Path
    form: str       # a key of READERS
    first: int      # byte of a JSONL file, row group of a Parquet file; else 0
    end: int        # the one behind the last, in the same unit
    size: int       # bytes on disk


Found = tuple[bytes | DocumentError, int]


def form_of(file: Path) -> str:
    """What `--format auto` takes a file for, by its name without `.gz` or `.zst`."""
    suffix = Path(file.stem).suffix if file.suffix in CODECS else file.suffix
    return "jsonl" if suffix in JSONL_SUFFIXES else "parquet" if suffix == ".parquet" else "text"


def text_file(span: Span, _: str) -> Iterator[Found]:
    """The whole file, kept to the byte."""
    try:
        with open_stream(span.file) as (_disk, stream):
            raw = stream.read(LONGEST_DOCUMENT + 1)
        if len(raw) > LONGEST_DOCUMENT:
            raise DocumentError(f"a text of over {LONGEST_DOCUMENT:,} bytes")
        if not raw.isascii():
            raw.decode("utf-8")
        yield raw, span.size
    except UnicodeDecodeError as error:
        yield DocumentError(f"{span.file}: no UTF-8 text (byte {error.start}: {error.reason})"), span.size
    except DocumentError as error:
        yield DocumentError(f"{span.file}: {error}"), span.size
    except OSError as error:
        yield damage(span.file, error), span.size


def json_lines(span: Span, text_key: str) -> Iterator[Found]:
    """One document a line, under `text_key`; a blank line is none. A line belongs to the span that holds its first byte."""
    number = 0
    try:
        with open_stream(span.file) as (disk, lines):
            whole = lines is not disk       # a compressed file is never cut
            position = start_of_line(lines, span)
            while whole or position < span.end:
                line = lines.readline(LONGEST_DOCUMENT + 1)
                if not line:
                    break
                number += 1
                position += len(line)
                done = disk.tell() if whole else position - span.first
                try:
                    if len(line) > LONGEST_DOCUMENT:
                        position += skip_line(lines)
                        raise DocumentError(f"a line of over {LONGEST_DOCUMENT:,} bytes")
                    if not line.isspace():
                        yield jsonl_text(line, text_key).encode(), done
                except DocumentError as error:
                    yield DocumentError(f"{span.file}:{lines_before(span) + number}: {error}"), done
    except OSError as error:
        yield damage(f"{span.file}:{number + 1}", error), span.size


def parquet_rows(span: Span, text_key: str) -> Iterator[Found]:
    """One document a row, in the column `text_key`."""
    import pyarrow

    try:
        with open_parquet(span.file) as table:
            check_column(table.schema_arrow, text_key)
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            row = sum(group.num_rows for group in groups[:span.first])
            for i in range(span.first, min(span.end, len(groups))):
                done = span.size * (i + 1 - span.first) // (span.end - span.first)
                rows = PARQUET_BATCH_BYTES * groups[i].num_rows // max(1, groups[i].total_byte_size)
                for batch in table.iter_batches(min(max(1, rows), 2**16), [i], columns=[text_key], use_threads=False):
                    for text in column_texts(batch.column(0)):
                        row += 1
                        yield (text if isinstance(text, bytes) else DocumentError(f"{span.file}: row {row}: {text}")), done
    except DocumentError as error:
        yield DocumentError(f"{span.file}: {error}"), span.size
    except pyarrow.ArrowException as error:
        yield DocumentError(f"{span.file}: no Parquet that can be read ({one_line(error)})"), span.size
    except OSError as error:
        yield damage(span.file, error), span.size


READERS: dict[str, Callable[[Span, str], Iterator[Found]]] = {
    "text": text_file, "jsonl": json_lines, "parquet": parquet_rows}


@contextmanager
def open_stream(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the file on disk, its content), the same object where nothing is compressed."""
    with file.open("rb", BUFFER_BYTES) as disk:
        if file.suffix not in CODECS or not file.stat().st_size:
            yield disk, disk
            return
        # Reads files of several gzip members or zstd frames, and says when one is cut short.
        import pyarrow

        with pyarrow.CompressedInputStream(disk, CODECS[file.suffix]) as content:
            yield disk, io.BufferedReader(content, DECOMPRESSED_BYTES)


def damage(place: object, error: OSError) -> DocumentError:
    """`error` as what is wrong with the file; raised on if it comes from the system."""
    if error.errno is not None:
        raise error
    return DocumentError(f"{place}: damaged ({one_line(error)})")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def start_of_line(lines: IO[bytes], span: Span) -> int:
    """Moves to the first line that begins in the span, and says where that is; to its end if none does."""
    if not span.first:
        return 0
    position = lines.seek(span.first - 1)       # a line may begin with the first byte
    while position < span.end:
        line = lines.readline(BUFFER_BYTES)
        position += len(line)
        if line.endswith(b"\n") or not line:
            break
    return position


def skip_line(lines: IO[bytes]) -> int:
    """Reads on to the end of the line; the number of bytes."""
    size = 0
    while line := lines.readline(BUFFER_BYTES):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def lines_before(span: Span) -> int:
    """Lines that begin before the span."""
    with span.file.open("rb", 0) as file:
        left, count, ends = span.first, 0, True
        while left and (chunk := file.read(min(left, BUFFER_BYTES))):
            left -= len(chunk)
            count += chunk.count(b"\n")
            ends = chunk.endswith(b"\n")
    return count + (not ends)


def jsonl_text(line: bytes, text_key: str) -> str:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DocumentError(f"no JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(entry, dict):
        raise DocumentError(f"no JSON object but {type(entry).__name__}")
    if text_key not in entry:
        raise DocumentError(f"no key {text_key!r} (its keys: {', '.join(entry) or 'none'})")
    if not isinstance(text := entry[text_key], str):
        raise DocumentError(f"{text_key!r} holds {type(text).__name__}, no text")
    return text


def open_parquet(file: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads a row group piece by piece, not at once."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)


def check_column(schema: Any, name: str) -> None:
    from pyarrow import types

    if name not in schema.names:
        raise DocumentError(f"no column {name!r} (its columns: {', '.join(schema.names) or 'none'})")
    kind = schema.field(name).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
        raise DocumentError(f"column {name!r} holds {kind}, no text")


def column_texts(column: Any) -> Iterator[bytes | DocumentError]:
    """From the column's buffers, as pyarrow makes Python objects slowly."""
    import pyarrow

    try:
        column.validate(full=True)
        sound = True
    except pyarrow.ArrowInvalid:        # a row is no UTF-8; find which
        sound = False
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(pyarrow.large_binary())
    _, ends, raw = column.buffers()
    offsets = np.frombuffer(ends, np.int64)[column.offset:column.offset + len(column) + 1].tolist()
    known = column.is_valid().to_pylist() if column.null_count else repeat(True)
    data = memoryview(raw) if raw else b""
    for first, end, is_known in zip(offsets, offsets[1:], known, strict=False):
        yield checked(bytes(data[first:end]), sound) if is_known else DocumentError("null, no text")


def checked(text: bytes, sound: bool) -> bytes | DocumentError:
    try:
        if not sound:
            text.decode()
        return text
    except UnicodeDecodeError as error:
        return DocumentError(f"no UTF-8 text (byte {error.start}: {error.reason})")
