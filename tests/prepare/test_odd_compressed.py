"""Odd but valid gzip and zstd files read as `gzip` and `zstd` read them; of damaged ones only the damage is lost."""

import bz2
import gzip
import lzma
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pyarrow
import pytest

from megadyn.errors import UserError
from megadyn.prepare.readers import Corpus

LINES = b"".join(b'{"text": "%d"}\n' % n for n in range(3000))
SHORT = b'{"text": "short"}\n'
RANDOM = b'{"text": "%s"}\n' % random.Random(0).randbytes(40_000).hex().encode()


def member(
    content: bytes = SHORT,
    *,
    flags: int = 0,
    more: bytes = b"",
    level: int = 6,
    strategy: int = 0,
    window: int = 15,
    time: int = 0,
    system: int = 3,
    xfl: int = 0,
    header_crc: bool = False,
) -> bytes:
    """One gzip member (RFC 1952)."""
    head = struct.pack("<2sBBIBB", b"\x1f\x8b", 8, flags | 2 * header_crc, time, xfl, system) + more
    if header_crc:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    packer = zlib.compressobj(level, zlib.DEFLATED, -window, 9, strategy)
    return (
        head
        + packer.compress(content)
        + packer.flush()
        + struct.pack("<II", zlib.crc32(content), len(content))
    )


def flushed(content: bytes, mode: int) -> bytes:
    """A member of many deflate blocks, some of them empty."""
    packer, out = zlib.compressobj(6, zlib.DEFLATED, 31), b""
    for first in range(0, len(content), 1000):
        out += packer.compress(content[first : first + 1000]) + packer.flush(mode) + packer.flush(mode)
    return out + packer.flush()


def bgzf(content: bytes) -> bytes:
    blocks = [content[i : i + 5000] for i in range(0, len(content), 5000)]
    return b"".join(
        member(block, flags=4, more=struct.pack("<H2sHH", 6, b"BC", 2, 99)) for block in [*blocks, b""]
    )


GZIP = {
    "one member": member(),
    "two members": member() + member(),
    "300 members": member() * 300,
    "cut inside a line": member(SHORT[:7]) + member(SHORT[7:]),
    "empty member": member(b""),
    "empty among others": member(b"") + member() + member(b"") + member(),
    "FTEXT": member(flags=1),
    "FNAME": member(flags=8, more=b"other.txt\0"),
    "FNAME empty": member(flags=8, more=b"\0"),
    "FNAME Latin-1": member(flags=8, more="é.txt".encode("latin-1") + b"\0"),
    "FNAME long": member(flags=8, more=b"x" * 70_000 + b"\0"),
    "FCOMMENT": member(flags=16, more=b"a comment\0"),
    "FEXTRA": member(flags=4, more=struct.pack("<H", 5) + b"extra"),
    "FEXTRA empty": member(flags=4, more=b"\0\0"),
    "FEXTRA largest": member(flags=4, more=b"\xff\xff" + b"e" * 65535),
    "FHCRC": member(header_crc=True),
    "all fields": member(flags=1 | 4 | 8 | 16, more=b"\2\0ex" + b"name\0" + b"comment\0", header_crc=True),
    "no time": member(time=0),
    "time of the future": member(time=2**32 - 1),
    "system unknown": member(system=255),
    "system FAT": member(system=0),
    "XFL best": member(xfl=2),
    "XFL fast": member(xfl=4),
    "stored": member(RANDOM, level=0),
    "level 9": member(LINES, level=9),
    "fixed Huffman": member(LINES, strategy=zlib.Z_FIXED),
    "Huffman alone": member(LINES, strategy=zlib.Z_HUFFMAN_ONLY),
    "runs": member(LINES, strategy=zlib.Z_RLE),
    "window of 512 bytes": member(LINES, window=9),
    "sync flushes": flushed(LINES, zlib.Z_SYNC_FLUSH),
    "full flushes": flushed(LINES, zlib.Z_FULL_FLUSH),
    "bgzip": bgzf(LINES),
    "no final line end": member(SHORT[:-1]),
    "padding of zeros": member() + bytes(100),
    "padding of a tape": member(LINES) + bytes(1_000_000),
    "as gzip writes it": gzip.compress(LINES),
    "large": member(RANDOM * 4),
}


def skippable(size: int = 5, number: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + number, size) + bytes(size)


def zstd(content: bytes, *options: str) -> bytes:
    return subprocess.run(
        ["zstd", "-q", "-c", *options], input=content, stdout=subprocess.PIPE, check=True
    ).stdout


def raw_frame(
    *blocks: tuple[int, bytes], window: int = 0x40, single: int | None = None, dictionary: bytes = b""
) -> bytes:
    """A zstd frame (RFC 8878) of raw (0) or run-length (1) blocks: (kind, content)."""
    did = {0: 0, 1: 1, 2: 2, 4: 3}[len(dictionary)]
    head = (
        bytes([did | (0x20 if single is not None else 0)])
        + (b"" if single is not None else bytes([window]))
        + dictionary
    )
    out = b"\x28\xb5\x2f\xfd" + head + (bytes([single]) if single is not None else b"")
    for i, (kind, content) in enumerate(blocks):
        size = len(content) if kind == 0 else len(SHORT)
        out += struct.pack("<I", (i == len(blocks) - 1) | kind << 1 | size << 3)[:3] + content
    return out


def zstd_files() -> dict[str, bytes]:
    one, block = pyarrow.compress(SHORT, "zstd", asbytes=True), (0, SHORT)
    return {
        "one frame": one,
        "two frames": one + one,
        "300 frames": one * 300,
        "cut inside a line": zstd(SHORT[:7]) + zstd(SHORT[7:]),
        "empty frame": zstd(b""),
        "empty among others": zstd(b"") + one + zstd(b""),
        "skippable before": skippable() + one,
        "skippable behind": one + skippable(),
        "skippable between": one + skippable() + one,
        "skippable alone": skippable(),
        "skippable empty": skippable(0) + one,
        "skippable large": skippable(300_000) + one,
        "last skippable number": skippable(number=15) + one,
        "every skippable number": b"".join(skippable(number=n) for n in range(16)) + one,
        "checksum": zstd(LINES, "--check"),
        "no checksum": zstd(LINES, "--no-check"),
        "no content size": zstd(LINES, "--no-content-size"),
        "content size": zstd(LINES, f"--stream-size={len(LINES)}"),
        "level 1": zstd(LINES, "-1"),
        "level 19": zstd(LINES, "-19"),
        "ultra": zstd(LINES, "--ultra", "-22"),
        "fast": zstd(LINES, "--fast=5"),
        "long window": zstd(LINES, "--long=27"),
        "rsyncable": zstd(LINES, "-T1", "--rsyncable"),
        "incompressible": zstd(RANDOM),
        "large": zstd(RANDOM * 4, "--check"),
        "raw block": raw_frame(block),
        "raw blocks": raw_frame(block, block, block),
        "empty last block": raw_frame(block, (0, b"")),
        "empty blocks": raw_frame((0, b""), block, (0, b""), (0, b"")),
        "single segment": raw_frame(block, single=len(SHORT)),
        "run of blanks": raw_frame(block, (1, b" ")),
        "least window": raw_frame(block, window=0),
        "window of an eighth": raw_frame(block, window=0x43),
        "dictionary 0, one byte": raw_frame(block, dictionary=b"\0"),
        "dictionary 0, four bytes": raw_frame(block, dictionary=bytes(4)),
        "no final line end": zstd(SHORT[:-1]),
        "pzstd": skippable(4, 0) + zstd(SHORT) + skippable(4, 0) + zstd(SHORT),
        "as pyarrow writes it": pyarrow.compress(LINES, "zstd", asbytes=True),
    }


def by_tool(tool: str, raw: bytes) -> bytes:
    done = subprocess.run([tool, "-d", "-c"], input=raw, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gzip_files_read_as_gzip_reads_them(tmp_path):
    assert len(GZIP) >= 30
    check_all(tmp_path, "gz", "gzip", GZIP)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the program zstd (apt-get install zstd)")
def test_zstd_files_read_as_zstd_reads_them(tmp_path):
    files = zstd_files()
    assert len(files) >= 30
    check_all(tmp_path, "zst", "zstd", files)


def check_all(folder: Path, suffix: str, tool: str, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        content = by_tool(tool, raw)
        for form in ("txt", "jsonl"):
            path = folder / f"x.{form}.{suffix}"
            path.write_bytes(raw)
            want = (
                [content]
                if form == "txt"
                else [line[10:-2] for line in content.splitlines() if not line.isspace()]
            )
            assert [text.encode() for text in Corpus([path])] == want, (name, form)
            (folder / "untold").write_bytes(raw)  # by its content alone
            told = Corpus([folder / "untold"], form="jsonl" if form == "jsonl" else "auto")
            assert form == "txt" or [text.encode() for text in told] == want, name


def in_two(pack) -> tuple[bytes, bytes, bytes]:
    """Three members of whole lines."""
    lines = LINES.splitlines(keepends=True)
    return tuple(pack(b"".join(lines[i : i + 1000])) for i in (0, 1000, 2000))


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_only_what_is_damaged_is_lost(tmp_path, suffix):
    pack = {
        "gz": gzip.compress,
        "zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }[suffix]
    first, second, third = in_two(pack)
    all_texts = [str(n) for n in range(3000)]
    middle = len(second) // 2
    for name, raw, least, reason in [
        (
            "cut at the end",
            (first + second + third)[:-1],
            2900 if suffix in ("gz", "xz") else 2000,
            "cut short",
        ),
        ("cut in the third", first + second + third[:middle], 2000, "cut short"),
        ("cut between", first + second[:middle] + third, 2000, ""),
        (
            "zeros in the second",
            first + second[:middle] + bytes(30) + second[middle + 30 :] + third,
            2000,
            "",
        ),
        (
            "garbage behind",
            first + second + third + b"garbage",
            3000,
            f"the content at byte {len(first + second + third)} is not",
        ),
        (
            "garbage between",
            first + b"garbage" + second + third,
            3000,
            f"the content at byte {len(first)} is not",
        ),
    ]:
        path = tmp_path / f"x.jsonl.{suffix}"
        path.write_bytes(raw)
        corpus = Corpus([path], on_error="skip")
        found = list(corpus)
        assert set(found) >= set(all_texts[:1000]), name
        assert (name.startswith("cut") and "between" not in name) or found[-1000:] == all_texts[-1000:], name
        assert len(found) >= least, (name, len(found))
        if reason:
            assert corpus.skipped == 1 and reason in corpus.first_skipped, (name, corpus.first_skipped)
        # lines of nonsense, decompressed up to where that is noticed, are counted too
        assert corpus.skipped >= 1
        with pytest.raises(UserError, match="damaged" if reason else "x.jsonl"):
            list(Corpus([path]))
    (tmp_path / f"x.txt.{suffix}").write_bytes(first + b"garbage")
    corpus = Corpus([tmp_path / f"x.txt.{suffix}"], on_error="skip")
    assert [len(text) for text in corpus] == [len(b"".join(LINES.splitlines(keepends=True)[:1000]))]
    assert "damaged after its text" in corpus.first_skipped


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz", "lz4"])
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_damage_before_any_content_is_told(tmp_path, suffix, form):
    """What looks at a file's first bytes must not swallow it."""
    path = tmp_path / f"x.{form}.{suffix}"
    content = RANDOM * 3
    if suffix in ("zst", "lz4"):
        codec = {"zst": "zstd", "lz4": "lz4"}[suffix]
        with pyarrow.CompressedOutputStream(str(path), codec) as stream:
            stream.write(content)
        raw = path.read_bytes()
    else:
        raw = {"gz": gzip, "bz2": bz2, "xz": lzma}[suffix].compress(content)
    for name, damaged in {
        "cut": raw[: 24 if suffix in ("gz", "xz") else len(raw) // 3],
        "zeros": raw[:30] + bytes(40) + raw[70:],
    }.items():
        if name == "zeros" and suffix == "lz4":
            continue  # pyarrow writes no checksum
        path.write_bytes(damaged)
        corpus = Corpus([path], on_error="skip")
        found = list(corpus)
        assert corpus.skipped >= 1, (name, found)
        assert all(len(text) <= len(RANDOM) for text in found)
        with pytest.raises(UserError, match=f"x.{form}.{suffix}"):
            list(Corpus([path]))


def test_behind_invalid_characters_the_next_line_is_read(tmp_path):
    lines = [f'{{"text": "{n}"}}\n' for n in range(4)]
    raw = "".join(lines).encode("utf-16-le").replace("1".encode("utf-16-le"), b"\x00\xdc")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe" + raw)
    corpus = Corpus([tmp_path / "x.jsonl"], on_error="skip")
    assert list(corpus) == ["0", "2", "3"]
    assert corpus.skipped == 1 and "not UTF-16 text" in corpus.first_skipped


def test_utf_16_goes_on_behind_a_damaged_member(tmp_path):
    members = [
        gzip.compress(("\ufeff" * (n == 0) + f'{{"text": "{n}"}}\n').encode("utf-16-le")) for n in range(3)
    ]
    damaged = members[1][:12] + bytes(8) + members[1][20:]
    (tmp_path / "x.jsonl.gz").write_bytes(members[0] + damaged + members[2])
    corpus = Corpus([tmp_path / "x.jsonl.gz"], on_error="skip")
    assert list(corpus) == ["0", "2"]
    assert corpus.skipped >= 1


def test_why_a_frame_is_not_read_is_told(tmp_path):
    for raw, reason in [
        (raw_frame((0, SHORT), dictionary=b"\x07"), "compressed with dictionary 7, which is not available"),
        (
            raw_frame((0, SHORT), window=0xA8),
            "its window of 2048 MiB is over 128; decompress it with zstd --long=31 first",
        ),
        (raw_frame((3, SHORT)), "invalid zstd block at byte 33"),
    ]:
        good = pyarrow.compress(SHORT, "zstd", asbytes=True)
        (tmp_path / "x.jsonl.zst").write_bytes(good + raw + good)
        corpus = Corpus([tmp_path / "x.jsonl.zst"], on_error="skip")
        assert list(corpus) == ["short", "short"]
        assert corpus.skipped == 1 and reason in corpus.first_skipped


@pytest.mark.parametrize("suffix", ["bz2", "xz", "lz4"])
def test_other_compressions_are_read(tmp_path, suffix):
    path = tmp_path / f"X.JSONL.{suffix.upper()}"
    if suffix == "lz4":
        with pyarrow.CompressedOutputStream(str(path), "lz4") as stream:
            stream.write(LINES)
        once = path.read_bytes()
    else:
        once = {"bz2": bz2, "xz": lzma}[suffix].compress(LINES)
    path.write_bytes(once + once)
    assert list(Corpus([path])) == [str(n) for n in range(3000)] * 2
