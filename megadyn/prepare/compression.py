"""Content of compressed files up to the end of the last member or frame, and as much as possible of damaged files.

pyarrow decompresses at full speed. What it refuses is read again here, member by member. Padding is skipped. If
something is damaged, the content before it and that of the next intact member are still returned.
"""

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, NamedTuple, Protocol

SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".bgz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lz4": "lz4",
}
BY_PYARROW = ("gzip", "zstd", "lz4")
MAGIC = {
    "gzip": b"\x1f\x8b\x08",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "lz4": b"\x04\x22\x4d\x18",
}
LONGEST_HEAD = 18
"""Number of bytes needed to recognise a member."""
BZ2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
"""What can follow the four bytes of a bzip2 header: a block, or the end of an empty stream."""
SKIPPABLE = b"\x2a\x4d\x18"
"""Bytes 1 to 3 of a skippable frame of zstd and lz4; byte 0 is 0x50 to 0x5f."""
PIECE_BYTES = 2**16
SCAN_BYTES = 2**20
LARGEST_ZSTD_BLOCK = 2**17
LARGEST_ZSTD_WINDOW = 2**27
"""Limit of `zstd` without --long, and of pyarrow."""


class Damage(NamedTuple):
    reason: str
    is_lost: bool
    """Whether content is lost; otherwise only bytes after it are damaged."""


class Broken(Exception):
    """A member cannot be read any further."""


Open = Callable[[], IO[bytes]]


def codec_of(head: bytes, suffix: str = "") -> str | None:
    """The compression of a file, from its first `LONGEST_HEAD` bytes; `suffix` decides if these leave two possibilities."""
    if len(head) >= 4 and 0x50 <= head[0] <= 0x5F and head[1:4] == SKIPPABLE:
        return "lz4" if SUFFIXES.get(suffix) == "lz4" else "zstd"
    if head.startswith(MAGIC["bz2"]):
        return "bz2" if head[3:4].isdigit() and head[4:10] in BZ2_BLOCKS else None
    return next((codec for codec, magic in MAGIC.items() if head.startswith(magic)), None)


class Decompressed(io.RawIOBase):
    """The content of a compressed file.

    At damage it reads as if the file ended there, and `damage` gives the reason. Whoever sees it sets it to None; reading on
    then returns what follows. Until then it stays at the damage, so that a look ahead cannot swallow it.
    """

    def __init__(self, open_file: Open, codec: str) -> None:
        import pyarrow

        self.damage: Damage | None = None
        self._open, self._codec = open_file, codec
        self.disk = open_file()
        self._fast = pyarrow.CompressedInputStream(self.disk, codec) if codec in BY_PYARROW else None
        self._pieces: Iterator[bytes | Damage] = iter(()) if self._fast else members(self.disk, codec)
        self._given, self._left = 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.disk.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        if self.damage is not None:
            return 0
        if self._fast is not None:
            try:
                size: int = self._fast.readinto(buffer)
                self._given += size
                return size
            except OSError as error:
                if error.errno is not None:
                    raise
                self._begin_again()
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            if isinstance(piece, Damage):
                self.damage = piece
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def _begin_again(self) -> None:
        """Restarts member by member, and skips what was already returned."""
        self._fast, self.disk = None, self._open()
        self._pieces = members(self.disk, self._codec)
        skip = self._given
        while skip:
            piece = next(self._pieces)
            assert isinstance(piece, bytes), "pyarrow returned content that cannot be read"
            self._left = memoryview(piece)[skip:]
            skip -= min(skip, len(piece))


def members(disk: IO[bytes], codec: str) -> Iterator[bytes | Damage]:
    """The content of all members of a file, in pieces, and any damage between them."""
    size, at = disk.seek(0, io.SEEK_END), 0
    while (at := past_zeros(disk, at)) < size:
        disk.seek(at)
        head = disk.read(LONGEST_HEAD)
        if codec in ("zstd", "lz4") and len(head) >= 8 and 0x50 <= head[0] <= 0x5F and head[1:4] == SKIPPABLE:
            at += 8 + struct.unpack("<I", head[4:8])[0]
            if at > size:
                yield Damage("a skippable frame is cut short", is_lost=False)
            continue
        if codec_of(head) == codec or MAGIC[codec].startswith(head):
            try:
                at = yield from pieces_of(disk, at, codec)
                continue
            except Broken as error:
                reason = str(error)
            following = next_member(disk, at + 1, codec)
            yield Damage(reason, is_lost=True)
        else:
            following = next_member(disk, at + 1, codec)
            yield Damage(f"the content at byte {at} is not {codec}", is_lost=following is not None)
        if following is None:
            return
        at = following


def past_zeros(disk: IO[bytes], at: int) -> int:
    """The offset after padding (to the block of a tape or a file system), which is not content."""
    disk.seek(at)
    while chunk := disk.read(PIECE_BYTES):
        kept = chunk.lstrip(b"\0")
        at += len(chunk) - len(kept)
        if kept:
            break
    return at


def next_member(disk: IO[bytes], at: int, codec: str) -> int | None:
    """Offset of the next member, as recognised by its head. None if there is none, or for lz4, whose frames are read
    together."""
    if codec == "lz4":
        return None
    disk.seek(at)
    held = b""
    while chunk := disk.read(SCAN_BYTES):
        held += chunk
        found = held.find(MAGIC[codec])
        while found >= 0:
            head = held[found : found + LONGEST_HEAD]
            if codec_of(head) == codec and (codec != "gzip" or is_likely_gzip(head)):
                return at + found
            found = held.find(MAGIC[codec], found + 1)
        keep = len(held) - LONGEST_HEAD + 1
        if keep > 0:
            at, held = at + keep, held[keep:]
    return None


def is_likely_gzip(head: bytes) -> bool:
    """Checks more fields, which have few valid values, because the three magic bytes also occur by chance."""
    return (
        len(head) == LONGEST_HEAD
        and head[3] < 0x20
        and head[8] in (0, 2, 4)
        and (head[9] <= 13 or head[9] == 255)
    )


class Member(Protocol):
    @property
    def end(self) -> int:
        """Offset in the file at which it ends; known after all of it was read."""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at its end. Raises `Broken` at damage."""

    def feed_slowly(self) -> None:
        """From now on reads small pieces, so that nothing before the damage is lost."""


def pieces_of(disk: IO[bytes], at: int, codec: str) -> Generator[bytes, None, int]:
    """Yields the content of the member at `at`; returns where it ends. Raises `Broken` after everything that is readable."""

    def opened() -> Member:
        return ByPyarrow(disk, at, codec) if codec in ("zstd", "lz4") else ByLibrary(disk, at, codec)

    member, reads = opened(), 0
    try:
        while piece := member.read(PIECE_BYTES):
            yield piece
            reads += 1
        return member.end
    except Broken as error:
        broken = error
    member = opened()
    for _ in range(reads):
        member.read(PIECE_BYTES)
    member.feed_slowly()
    last = bytearray()  # since the last whole piece; a failed read is repeated byte by byte
    try:
        while piece := member.read(1):
            last += piece
    except Broken:
        yield bytes(last)
    raise broken


class Inflate:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail


class ByLibrary:
    """A member read by the standard library: gzip, bzip2, xz."""

    def __init__(self, disk: IO[bytes], at: int, codec: str) -> None:
        self.end = at
        self._disk = disk
        self._decoder: Any = {"gzip": Inflate, "bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}[
            codec
        ]()
        self._step = PIECE_BYTES

    def feed_slowly(self) -> None:
        self._step = 1

    def read(self, size: int) -> bytes:
        while not self._decoder.eof:
            data, is_cut = b"", False
            if self._decoder.needs_input:
                self._disk.seek(self.end)
                data = self._disk.read(self._step)
                self.end += len(data)
                is_cut = not data
            try:
                piece: bytes = self._decoder.decompress(data, size)
            except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
                raise Broken(str(error)) from error
            if piece:
                return piece
            if is_cut and not self._decoder.eof:
                raise Broken("cut short")
        self.end -= len(self._decoder.unused_data)
        self._decoder = Ended
        return b""


class Ended:
    eof, unused_data = True, b""


class ByPyarrow:
    """One frame of zstd, or for lz4 the whole rest of the file."""

    def __init__(self, disk: IO[bytes], at: int, codec: str) -> None:
        import pyarrow

        self._source = ZstdFrame(disk, at) if codec == "zstd" else Rest(disk, at)
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._source, mode="r"), codec)

    @property
    def end(self) -> int:
        return self._source.at

    def feed_slowly(self) -> None:
        """Nothing to do: zstd is already fed block by block."""

    def read(self, size: int) -> bytes:
        try:
            piece: bytes = self._stream.read(size)
        except OSError as error:
            raise Broken(self._source.problem or str(error)) from error
        if not piece and self._source.problem:
            raise Broken(self._source.problem)
        return piece


class Rest(io.RawIOBase):
    """A file from offset `at` to its end."""

    problem: str | None = None

    def __init__(self, disk: IO[bytes], at: int) -> None:
        self.at = at
        self._disk = disk

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._disk.seek(self.at)
        raw = self._disk.read(size if size >= 0 else PIECE_BYTES)
        self.at += len(raw)
        return raw


class ZstdFrame(Rest):
    """One frame, block by block (RFC 8878, section 3.1.1); `problem` says what is wrong with its structure."""

    def __init__(self, disk: IO[bytes], at: int) -> None:
        super().__init__(disk, at)
        self._parts, self._held = self._walk(), b""

    def read(self, size: int = -1) -> bytes:
        while not self._held:
            try:
                self._held = next(self._parts)
            except StopIteration:
                return b""
            except Broken as error:
                self.problem = str(error)
                return b""
        raw, self._held = (self._held[:size], self._held[size:]) if size >= 0 else (self._held, b"")
        return raw

    def _take(self, size: int) -> bytes:
        raw = super().read(size)
        if len(raw) < size:
            raise Broken("cut short")
        return raw

    def _walk(self) -> Iterator[bytes]:
        start = self._take(5)
        flags = start[4]
        is_single, has_checksum = flags >> 5 & 1, flags >> 2 & 1
        window = b"" if is_single else self._take(1)
        dictionary = self._take((0, 1, 2, 4)[flags & 3])
        content_size = self._take((is_single, 2, 4, 8)[flags >> 6])
        if number := int.from_bytes(dictionary, "little"):
            raise Broken(f"compressed with dictionary {number}, which is not available")
        if window:
            base = 1 << 10 + (window[0] >> 3)
            needed = base + base // 8 * (window[0] & 7)
            if needed > LARGEST_ZSTD_WINDOW:
                raise Broken(
                    f"its window of {needed // 2**20} MiB is over {LARGEST_ZSTD_WINDOW // 2**20}; decompress it with "
                    "zstd --long=31 first"
                )
        yield start + window + dictionary + content_size
        is_last = 0
        while not is_last:
            raw = self._take(3)
            block = int.from_bytes(raw, "little")
            is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
            if kind == 3 or size > LARGEST_ZSTD_BLOCK:
                raise Broken(f"invalid zstd block at byte {self.at - 3}")
            yield raw + self._take(1 if kind == 1 else size)
        if has_checksum:
            yield self._take(4)
