"""Documents of one column of a table: Parquet, Arrow (files, streams, Feather)."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np

from megadyn.errors import one_line
from megadyn.prepare.formats import BUFFER_BYTES, DocumentError, Found, Span, damage
from megadyn.prepare.remote import File, RemoteFile

PARQUET_BATCH_BYTES = 2**22


def parquet_rows(span: Span, text_key: str) -> Iterator[Found]:
    """One document per row, from the column `text_key`. What cannot be read of a row group is lost; reading continues
    with the next."""
    import pyarrow

    try:
        with open_parquet(span.file) as table:
            check_column(table.schema_arrow, text_key)
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            row = sum(group.num_rows for group in groups[: span.first])
            for i in range(span.first, min(span.end, len(groups))):
                done = span.size * (i + 1 - span.first) // (span.end - span.first)
                end = row + groups[i].num_rows
                rows = PARQUET_BATCH_BYTES * groups[i].num_rows // max(1, groups[i].total_byte_size)
                try:
                    for batch in table.iter_batches(
                        min(max(1, rows), 2**16), [i], columns=[text_key], use_threads=False
                    ):
                        for text in column_texts(batch.column(0)):
                            row += 1
                            yield (
                                (
                                    text
                                    if isinstance(text, bytes)
                                    else DocumentError(f"{span.file}: row {row}: {text}")
                                ),
                                done,
                            )
                except (pyarrow.ArrowException, OSError) as error:
                    reason = damage(f"{span.file}: rows {row + 1} to {end}, of row group {i}", error)
                    row = end
                    yield reason, done
    except DocumentError as error:
        yield DocumentError(f"{span.file}: {error}"), span.size
    except pyarrow.ArrowException as error:
        yield DocumentError(f"{span.file}: cannot be read as Parquet ({one_line(error)})"), span.size
    except OSError as error:
        yield damage(span.file, error), span.size


def arrow_rows(span: Span, text_key: str) -> Iterator[Found]:
    """One document per row, from the column `text_key`, of a file or stream of record batches."""
    import pyarrow

    row = 0
    try:
        with open_arrow(span.file) as file:
            for batch in arrow_batches(file, text_key):
                for text in column_texts(batch.column(text_key)):
                    row += 1
                    yield (
                        (
                            text
                            if isinstance(text, bytes)
                            else DocumentError(f"{span.file}: row {row}: {text}")
                        ),
                        file.tell(),
                    )
    except DocumentError as error:
        yield DocumentError(f"{span.file}: {error}"), span.size
    except (pyarrow.ArrowException, EOFError, OSError) as error:
        yield damage(f"{span.file}: from row {row + 1} on", error), span.size


def open_arrow(file: File) -> Any:
    """Of pyarrow's own where it can, which reads without Python."""
    import pyarrow

    if isinstance(file, RemoteFile):
        return pyarrow.PythonFile(file.open(), mode="r")
    return pyarrow.OSFile(str(file))


def arrow_batches(file: Any, text_key: str) -> Iterator[Any]:
    import pyarrow

    is_stream = file.read(6) != b"ARROW1"
    file.seek(0)
    reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
    check_column(reader.schema, text_key)
    yield from reader if is_stream else (reader.get_batch(i) for i in range(reader.num_record_batches))


def open_parquet(file: File) -> Any:
    """A `pyarrow.parquet.ParquetFile` that reads row groups in pieces, not all at once."""
    import pyarrow.parquet

    source = open_arrow(file) if isinstance(file, RemoteFile) else file
    return pyarrow.parquet.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)


def check_column(schema: Any, name: str) -> None:
    """Raises `DocumentError` unless exactly one column has this name, and it holds text or bytes (which may be UTF-8)."""
    import pyarrow
    from pyarrow import types

    if name not in schema.names:
        raise DocumentError(f"no column {name!r} (its columns: {', '.join(schema.names) or 'none'})")
    if schema.names.count(name) > 1:
        raise DocumentError(f"{schema.names.count(name)} columns {name!r}")
    kind = schema.field(name).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    known = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_null,
    )
    if not any(is_it(kind) for is_it in known):
        raise DocumentError(f"column {name!r} holds {kind}, not text")


def column_texts(column: Any) -> Iterator[bytes | DocumentError]:
    """Texts taken from the column's buffers, because pyarrow creates Python objects slowly."""
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        # 64-bit offsets, because the texts may exceed 2 GB in total.
        column = column.dictionary.cast(pyarrow.large_binary()).take(column.indices)
    column = column.cast(pyarrow.large_binary())
    try:
        column.view(pyarrow.large_string()).validate(full=True)
        sound = True
    except pyarrow.ArrowInvalid:  # some row is not UTF-8; find out which
        sound = False
    _, ends, raw = column.buffers()
    if not ends:  # a column without rows may have no buffers
        return
    offsets = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1].tolist()
    known = column.is_valid().to_pylist() if column.null_count else repeat(True)
    data = memoryview(raw) if raw else b""
    for first, end, is_known in zip(offsets, offsets[1:], known, strict=False):
        yield checked(bytes(data[first:end]), sound) if is_known else DocumentError("null, not text")


def checked(text: bytes, sound: bool) -> bytes | DocumentError:
    try:
        if not sound:
            text.decode()
        return text
    except UnicodeDecodeError as error:
        return DocumentError(f"not UTF-8 (byte {error.start}: {error.reason})")
