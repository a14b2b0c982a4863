"""Detects what a file is, by its content and its name. Unknown formats are not read."""

import io
import json
import re
from pathlib import Path
from typing import NamedTuple

from megadyn.prepare.compression import LONGEST_HEAD, SUFFIXES, Decompressed, codec_of
from megadyn.prepare.remote import File

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".ldjson")
PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
ARROW_SUFFIXES = (".arrow", ".arrows", ".feather")
TABLES = {
    ".csv": "a table of comma-separated values",
    ".tsv": "a table of tab-separated values",
    ".tab": "a table of tab-separated values",
    ".psv": "a table of separated values",
    ".xls": "a spreadsheet",
    ".ipynb": "a notebook",
}
SOURCES = frozenset(
    (
        ".txt",
        ".text",
        ".md",
        ".rst",
        ".tex",
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".rs",
        ".go",
        ".java",
        ".kt",
        ".js",
        ".ts",
        ".jsx",
        ".tsx",
        ".rb",
        ".php",
        ".pl",
        ".sh",
        ".lua",
        ".sql",
        ".html",
        ".htm",
        ".css",
        ".scss",
        ".xml",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".swift",
        ".scala",
        ".r",
        ".f",
        ".f90",
        ".hs",
        ".ml",
        ".ex",
        ".erl",
        ".cs",
        ".vb",
        ".dart",
        ".proto",
        ".cmake",
    )
)
"""Suffixes of files that are text whatever they look like; their type is not checked before they are read."""
KNOWN = "known are UTF-8 text, JSON lines, Parquet and Arrow; text and JSON lines also as gzip, zstd, bzip2, xz or lz4"
HEAD_BYTES = 2**14
NOT_READ = {
    b"PARE": "Parquet with an encrypted footer",
    b"PK\3\4": "a zip archive",
    b"PK\5\6": "a zip archive",
    b"%PDF": "PDF",
    b"\x7fELF": "a program",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a numpy array",
    b"Obj\1": "Avro",
    b"ORC": "ORC",
    b"GIF8": "an image",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x9d": "a file of compress (.Z)",
    b"\x1f\x1e": "a file of pack (.z)",
    # Frames of zstd before its format was final; the last byte of the magic number counts up (zstd's lib/legacy).
    b"\x1e\xb5\x2f\xfd": "zstd of format 0.1, older than its standard",
    **{
        bytes([0x20 + minor]) + b"\xb5\x2f\xfd": f"zstd of format 0.{minor}, older than its standard"
        for minor in range(2, 8)
    },
    b"FEA1": "Feather version 1",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"MMIDIDX\0": "the index of a dataset",
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS, whose content was not downloaded",
}
"""Formats that are not read, by their first bytes. Magic bytes that could begin a text are followed by bytes that could not."""
MAYBE_TEXT = {b"ORC", b"Rar!", b"GIF8", b"FEA1", b"%PDF"}
BEGINS_OBJECT = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*["\[{\d\-tfnNI]')
"""A JSON object up to the beginning of its first value."""
MOST_CONTROLS = 1 / 16
"""Largest share of control characters in a text."""
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\b\x1b"))
BOMS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class Kind(NamedTuple):
    form: str
    """How it is read; `refused` if it is not (`problem` has the reason)."""
    is_plain: bool = True
    """Whether it is uncompressed UTF-8, so that it can be cut."""
    problem: str | None = None


def kind_of(file: File, form: str = "auto") -> Kind:
    """What `file` is, or how it can be read as `form`."""
    suffix, outer = telling_suffixes(file)
    if suffix in SOURCES and not outer and form in ("auto", "text"):
        return Kind("text")
    with file.open("rb", 0) as disk:
        head = disk.read(HEAD_BYTES)
    codec = codec_of(head[:LONGEST_HEAD], outer)
    if outer and not codec and head:
        content = not_text(head)
        what = f"it is {content}" if content else "its content is not"
        return Kind("refused", problem=f"its name says {SUFFIXES[outer]}, but {what}")
    if codec:
        head = decompressed_head(file, codec)
    found, problem = (form, None) if form in ("text", "jsonl") else form_of(file.name, suffix, head)
    if form in ("parquet", "arrow"):
        found, problem = form, None
    if problem is None and codec and found in ("parquet", "arrow"):
        problem = f"{found.capitalize()} compressed as a whole: decompress the file first"
    if problem is None and found == "jsonl" and form == "auto":
        problem = not_by_line(head)
    if problem:
        return Kind("refused", problem=problem)
    return Kind(found, is_plain=not codec and encoding_of(head, found) is None)


def telling_suffixes(file: File) -> tuple[str, str]:
    """(suffix before the compression's suffix, compression's suffix) in lower case; either may be empty."""
    parts = Path(file.name.lower())
    if parts.suffix == ".tgz":
        return ".tar", ".gz"
    if parts.suffix in SUFFIXES:
        return Path(parts.stem).suffix, parts.suffix
    return parts.suffix, ""


def decompressed_head(file: File, codec: str) -> bytes:
    with io.BufferedReader(Decompressed(lambda: file.open("rb"), codec), HEAD_BYTES) as content:
        return content.read(HEAD_BYTES)


def form_of(name: str, suffix: str, head: bytes) -> tuple[str, str | None]:
    """(form, reason why it is not read or None) of a file whose content begins with `head`."""
    # Also x.csv.1 and x.csv~, but not x.csv.md or x.csv.jsonl.
    told = suffix in (*SOURCES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES, *ARROW_SUFFIXES)
    inner = [] if told else re.findall(r"\.[a-z]+", name.lower())
    table = next((part for part in reversed(inner) if part in TABLES), None)
    if head.startswith(b"PAR1"):
        return "parquet", None
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow", None
    if problem := not_text(head):
        return "text", f"{problem}: not supported ({KNOWN})"
    if table:
        return "text", (
            f"{TABLES[table]}: not supported, convert it to JSON lines or Parquet, or read it as text with "
            f"--format text ({KNOWN})"
        )
    if suffix in JSONL_SUFFIXES:
        return "jsonl", None
    if suffix in PARQUET_SUFFIXES:
        return "parquet", None
    if suffix in ARROW_SUFFIXES:
        return "arrow", None
    if suffix not in SOURCES and is_json_lines(head):
        return "jsonl", None
    if suffix not in SOURCES and is_binary(head):
        return "text", f"unknown format ({KNOWN})"
    return "text", None


def not_text(head: bytes) -> str | None:
    """What a file is if its first bytes show that it is not text; otherwise None."""
    for magic, name in NOT_READ.items():
        if head.startswith(magic) and (magic not in MAYBE_TEXT or is_binary(head)):
            return name
    return "a tar archive" if head[257:262] == b"ustar" else None


def is_binary(head: bytes) -> bool:
    """Whether it contains more control characters than a text would."""
    if any(head.startswith(bom) for bom in BOMS):
        return False
    return len(head) - len(head.translate(None, CONTROLS)) > len(head) * MOST_CONTROLS


def encoding_of(head: bytes, form: str) -> str | None:
    """The encoding of a text that is not UTF-8, from its byte order mark or, for JSON, from the positions of zeros;
    else None."""
    for bom, name in BOMS.items():
        if head.startswith(bom):
            return name
    if form == "jsonl" and (name := json.detect_encoding(head[:4])) not in ("utf-8", "utf-8-sig"):
        return name
    return None


def is_json_lines(head: bytes) -> bool:
    """Whether the first line that is not blank is a JSON object, or begins as one and goes on behind `head`."""
    text = head.decode(encoding_of(head, "jsonl") or "utf-8-sig", errors="ignore").lstrip()
    line, end, _ = text.partition("\n")
    if not end and len(head) == HEAD_BYTES:
        return bool(BEGINS_OBJECT.match(line))
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def not_by_line(head: bytes) -> str | None:
    """Why a JSON file does not hold one object per line, if its beginning shows that; otherwise None."""
    lines = head.lstrip(b"\xef\xbb\xbf \t\r\n").splitlines()
    first = lines[0].strip() if lines else b""
    if first == b"[" or (first.startswith(b"[{") and not first.endswith(b"}]")):
        return "one JSON array, not one object per line: convert it (jq -c '.[]')"
    if first.startswith(b"[{"):
        return "a JSON array per line, not an object: convert it (jq -c '.[]')"
    if first == b"{":
        return "a JSON object over several lines, not one per line: convert it (jq -c .)"
    return None
