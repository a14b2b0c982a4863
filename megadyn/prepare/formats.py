"""Reads the documents of a file or of a part of it: text and JSON lines, compressed or not (tables are in `columns`).

Each reader yields (document or error, bytes on disk read so far) and stops at the end of its `Span`. A document is its
text as UTF-8. An unreadable document is yielded as a `DocumentError`; everything lost at one damaged place is yielded
as a single error. No reader holds more in memory than one document or a few megabytes.
"""

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from megadyn.errors import one_line
from megadyn.prepare.compression import LONGEST_HEAD, Damage, Decompressed, codec_of
from megadyn.prepare.detect import HEAD_BYTES, encoding_of, kind_of, not_text, telling_suffixes
from megadyn.prepare.remote import File, RemoteFile

LONGEST_DOCUMENT = 2**30
"""Bytes; a longer line or text is refused, because a document must fit in memory."""
BUFFER_BYTES = 2**20
DECOMPRESSED_BYTES = 2**16
"""Bytes requested at a time."""
BOM = b"\xef\xbb\xbf"


class DocumentError(Exception):
    """What is wrong with a document; the message begins with its file, and line or row."""


@dataclass(frozen=True)
class Span:
    """A part of a file that can be read on its own. It contains the documents that begin in it."""

    file: File
    form: str  # a key of READERS
    first: int  # byte of a JSONL file, row group of a Parquet file; else 0
    end: int  # exclusive, in the same unit
    size: int  # bytes on disk


Found = tuple[bytes | DocumentError, int]


class Content:
    """The content of a file as UTF-8: decompressed, and converted from UTF-16 or UTF-32."""

    def __init__(self, file: File, form: str, first: int = 0, until: int = 0) -> None:
        """`first`: where reading begins; only plain files are read from elsewhere than 0. `until`: where it ends; 0 for all."""
        self.disk = opened(file, until)
        self._layers: list[Decompressed | Transcoded] = []
        self.stream: IO[bytes] = self.disk
        if not first:
            self._open_layers(file, form)

    def _open_layers(self, file: File, form: str) -> None:
        head = self.disk.read(HEAD_BYTES)
        self.disk.seek(0)
        if codec := codec_of(head[:LONGEST_HEAD], telling_suffixes(file)[1]):
            self._add(Decompressed(lambda: opened(file), codec))
            head = self.stream.peek(4) if isinstance(self.stream, io.BufferedReader) else b""
        if encoding := encoding_of(head, form):
            self._add(Transcoded(self.stream, encoding))

    def _add(self, layer: "Decompressed | Transcoded") -> None:
        self._layers.append(layer)
        self.stream = io.BufferedReader(layer, DECOMPRESSED_BYTES)

    @property
    def is_plain(self) -> bool:
        return not self._layers

    @property
    def bytes_read(self) -> int:
        """Bytes read on disk."""
        first = self._layers[0] if self._layers else None
        return first.disk.tell() if isinstance(first, Decompressed) else self.disk.tell()

    def take_damage(self) -> Damage | None:
        """Why the stream ended, if it ended because of damage."""
        for layer in self._layers:
            if damage := layer.damage:
                layer.damage = None
                return damage
        return None

    def close(self) -> None:
        if self.stream is not self.disk:
            self.stream.close()
        self.disk.close()


class Transcoded(io.RawIOBase):
    """Converts a text from another encoding to UTF-8.

    At invalid bytes it reads as if the text ended there, and `damage` gives the reason; as in `Decompressed`, reading goes on
    behind them once that is None again.
    """

    def __init__(self, source: IO[bytes], encoding: str) -> None:
        self.damage: Damage | None = None
        self._source, self._encoding = source, encoding
        # One that keeps an incomplete character in `buffer`, and the byte order in itself.
        self._decoder: Any = codecs.getincrementaldecoder(encoding)()
        self._raw, self._left, self._is_over = b"", b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and not self._is_over and self.damage is None:
            raw, self._raw = self._raw or self._source.read(DECOMPRESSED_BYTES), b""
            if not raw and getattr(getattr(self._source, "raw", None), "damage", None):
                return 0  # damage below; what follows it is read later
            try:
                self._left = self._decoder.decode(raw, final=not raw).encode()
                self._is_over = not raw
            except UnicodeDecodeError as error:
                self._decoder.buffer = b""
                self._left = self._decoder.decode(error.object[: error.start]).encode()
                self._raw = error.object[error.end :]
                self.damage = Damage(f"not {self._encoding.upper()} text ({error.reason})", is_lost=True)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def opened(file: File, until: int = 0) -> IO[bytes]:
    if isinstance(file, RemoteFile):
        return file.open("rb", BUFFER_BYTES, until or file.size)
    return file.open("rb", BUFFER_BYTES)


@contextmanager
def content_of(file: File, form: str, first: int = 0, until: int = 0) -> Iterator[Content]:
    content = Content(file, form, first, until)
    try:
        yield content
    finally:
        content.close()


def refused(span: Span, _: str) -> Iterator[Found]:
    """A file of a format that is not supported."""
    yield (
        DocumentError(f"{span.file}: {kind_of(span.file).problem or 'it changed while the corpus was read'}"),
        span.size,
    )


def text_file(span: Span, _: str) -> Iterator[Found]:
    """The whole file as one document, byte for byte."""
    try:
        with content_of(span.file, "text") as content:
            raw = content.stream.read(LONGEST_DOCUMENT + 1)
            damage = content.take_damage()
        if damage and damage.is_lost:
            raise DocumentError(f"damaged ({one_line(damage.reason)})")
        if len(raw) > LONGEST_DOCUMENT:
            raise DocumentError(f"a text of over {LONGEST_DOCUMENT:,} bytes")
        if problem := not_text(raw[:HEAD_BYTES]):
            raise DocumentError(f"not text but {problem}")
        if not raw.isascii():
            raw.decode("utf-8")
        yield raw, span.size
        if damage:
            yield (
                DocumentError(f"{span.file}: damaged after its text ({one_line(damage.reason)})"),
                span.size,
            )
    except UnicodeDecodeError as error:
        yield DocumentError(f"{span.file}: not UTF-8 (byte {error.start}: {error.reason})"), span.size
    except DocumentError as error:
        yield DocumentError(f"{span.file}: {error}"), span.size


def json_lines(span: Span, text_key: str) -> Iterator[Found]:
    """One document per line, under `text_key`; blank lines are skipped. A line belongs to the span that holds its first byte."""
    number, is_behind_damage = 0, False
    with content_of(span.file, "jsonl", span.first, span.end) as content:
        lines, whole = content.stream, not content.is_plain  # a compressed file is never cut
        position = start_of_line(lines, span)
        while whole or position < span.end:
            line = lines.readline(LONGEST_DOCUMENT + 1)
            damage = None if line.endswith(b"\n") else content.take_damage()
            if not line and not damage:
                break
            number += bool(line)
            position += len(line)
            done = content.bytes_read if whole else position - span.first
            try:
                if len(line) > LONGEST_DOCUMENT:
                    position += skip_line(lines)
                    raise DocumentError(f"a line of over {LONGEST_DOCUMENT:,} bytes")
                for text in texts_of_line(line, text_key):
                    yield text, done
            except DocumentError as error:
                if not damage and not is_behind_damage:  # otherwise the line is the rest of a damaged one
                    yield DocumentError(f"{place_of(span, number)}: {error}"), done
            if damage:
                yield (
                    DocumentError(f"{span.file}:{number + (not line)}: damaged ({one_line(damage.reason)})"),
                    done,
                )
            is_behind_damage = damage is not None


def damage(place: object, error: Exception) -> DocumentError:
    """Converts `error` to a `DocumentError` about the file; re-raises errors of the operating system."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return DocumentError(f"{place}: damaged ({one_line(error)})")


def start_of_line(lines: IO[bytes], span: Span) -> int:
    """Seeks to the first line that begins in the span and returns its position; to the span's end if there is none."""
    if not span.first:
        return 0
    position = lines.seek(span.first - 1)  # one byte earlier, because a line may begin exactly at `first`
    while position < span.end:
        line = lines.readline(BUFFER_BYTES)
        position += len(line)
        if line.endswith(b"\n") or not line:
            break
    return position


def skip_line(lines: IO[bytes]) -> int:
    """Reads to the end of the line; returns the number of bytes."""
    size = 0
    while line := lines.readline(BUFFER_BYTES):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def place_of(span: Span, number: int) -> str:
    """Where the span's line `number` is. The lines before it are not fetched only to be counted."""
    if isinstance(span.file, RemoteFile):
        return (
            f"{span.file}: line {number} after byte {span.first}" if span.first else f"{span.file}:{number}"
        )
    return f"{span.file}:{lines_before(span.file, span.first) + number}"


def lines_before(path: Path, position: int) -> int:
    """Number of lines that begin before that byte."""
    with path.open("rb", 0) as file:
        left, count, ends = position, 0, True
        while left and (chunk := file.read(min(left, BUFFER_BYTES))):
            left -= len(chunk)
            count += chunk.count(b"\n")
            ends = chunk.endswith(b"\n")
    return count + (not ends)


def texts_of_line(line: bytes, text_key: str) -> Sequence[bytes]:
    """The document of a line; none for a blank line; several if lines end with a bare `\\r`."""
    if not line or line.isspace():
        return ()
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return [text_of(entry, text_key) for entry in loaded_by_python(line, error)]
    return (text_of(entry, text_key),)


def loaded_by_python(line: bytes, error: orjson.JSONDecodeError) -> Iterator[Any]:
    """What Python's json, the reference, reads from a line that orjson refuses: NaN, lone surrogates, a byte order mark."""
    if not line.removeprefix(BOM).strip():
        return
    pieces = [line]
    if b"\r" in line.rstrip():  # never occurs inside a JSON string
        pieces = [piece for piece in line.split(b"\r") if piece.strip()]
    try:
        entries = [json.loads(line)]
    except RecursionError:
        raise DocumentError("JSON nested too deeply") from None
    except ValueError:
        try:
            entries = [json.loads(piece) for piece in pieces] if len(pieces) > 1 else []
        except (ValueError, RecursionError):
            entries = []
    if not entries:
        raise DocumentError(f"invalid JSON ({error.msg} at column {error.colno})") from error
    yield from entries


def text_of(entry: Any, text_key: str) -> bytes:
    if not isinstance(entry, dict):
        raise DocumentError(f"not a JSON object but {type(entry).__name__}")
    if text_key not in entry:
        raise DocumentError(f"no key {text_key!r} (its keys: {ascii_names(entry)})")
    if not isinstance(text := entry[text_key], str):
        raise DocumentError(f"{text_key!r} holds {type(text).__name__}, not text")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"{text_key!r} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is not text"
        ) from error


def ascii_names(entry: dict[str, Any]) -> str:
    return ", ".join(entry).encode(errors="backslashreplace").decode() or "none"
