# ruff: noqa: UP031 (a case a line, and braces in most)
"""Odd but valid JSON lines, Parquet, Arrow and text files read as their reference reads them: Python's json, pyarrow, Python."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megadyn.errors import UserError
from megadyn.prepare.readers import Corpus

ONE, TWO = '{"text": "one"}', '{"text": "two"}'

JSONL: dict[str, bytes] = {
    name: (text if isinstance(text, bytes) else text.encode())
    for name, text in {
        "plain": f"{ONE}\n{TWO}\n",
        "no final line end": f"{ONE}\n{TWO}",
        "CRLF": f"{ONE}\r\n{TWO}\r\n",
        "CR alone": f"{ONE}\r{TWO}\r",
        "CR in a line": '{"text":\r"one"}\n',
        "blank lines": f"\n\n{ONE}\n \t \n{TWO}\n\n",
        "white space around": f"  {ONE}\t\n\t{TWO}  \n",
        "byte order mark": b"\xef\xbb\xbf" + ONE.encode(),
        "marks in the middle": f"{ONE}\n\ufeff{TWO}\n",
        "NaN in another field": '{"score": NaN, "text": "one"}',
        "infinities": '{"a": Infinity, "b": -Infinity, "text": "one"}',
        "half a surrogate in another field": '{"id": "\\ud800", "text": "one"}',
        "half a surrogate in a key": '{"\\ud800": 1, "text": "one"}',
        "a pair": '{"text": "\\ud83d\\ude42"}',
        "NUL escaped": '{"text": "a\\u0000b"}',
        "every escape": r'{"text": "\"\\\/\b\f\n\r\t\u00e9"}',
        "U+2028 and 2029": '{"text": "a\u2028b\u2029c"}',
        "NEL and form feeds": '{"text": "a\x85b\u000bc"}'.replace("\x0b", ""),
        "DEL": '{"text": "a\x7fb"}',
        "non-characters": '{"text": "\ufffe\uffff"}',
        "last code point": '{"text": "\U0010ffff"}',
        "duplicate key": '{"text": "first", "text": "last"}',
        "duplicate of another": '{"a": 1, "a": 2, "text": "one"}',
        "big integer": '{"id": 123456789012345678901234567890, "text": "one"}',
        "digits by the thousand": '{"id": %s, "text": "one"}' % ("9" * 4000),
        "tiny and huge floats": '{"a": 1e-999, "b": 1e999, "text": "one"}',
        "minus zero": '{"a": -0.0, "b": -0, "text": "one"}',
        "deep arrays": '{"a": %s%s, "text": "one"}' % ("[" * 500, "]" * 500),
        "deep objects": '{"m": %s1%s, "text": "one"}' % ('{"a":' * 300, "}" * 300),
        "empty key": '{"": 1, "text": "one"}',
        "key escaped": '{"te\\u0078t": "one"}',
        "empty text": '{"text": ""}',
        "text last of many": '{%s, "text": "one"}' % ", ".join(f'"k{i}": {i}' for i in range(500)),
        "long line": json.dumps({"text": "x" * 300_000}),
        "UTF-16 little-endian": ("\ufeff" + f"{ONE}\n{TWO}").encode("utf-16-le"),
        "UTF-16 big-endian": ("\ufeff" + ONE).encode("utf-16-be"),
        "UTF-16 without mark": f"{ONE}\n{TWO}".encode("utf-16-le"),
        "UTF-32": ("\ufeff" + f"{ONE}\nx{TWO}"[: len(ONE) + 1]).encode("utf-32-le"),
        "empty": "",
        "blank": "\n \n",
        "mark alone": b"\xef\xbb\xbf",
        "null beside": '{"text": "one", "meta": null}',
        "nested text": '{"meta": {"text": "inner"}, "text": "one"}',
        "escaped solidus": '{"url": "http:\\/\\/x", "text": "one"}',
    }.items()
}


def by_json(raw: bytes) -> list[str]:
    """Line by line, as Python opens and parses them."""
    encoding = json.detect_encoding(raw)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with io.TextIOWrapper(io.BytesIO(raw), encoding=encoding) as lines:  # \r, \n and \r\n end a line
        joined = [line.strip("\ufeff \t\r\n") for line in lines]
    texts, held = [], ""
    for line in joined:
        held += line
        try:
            texts += [json.loads(held)["text"]] if held else []
            held = ""
        except ValueError:
            continue
    assert not held
    return texts


def test_json_lines_read_as_json_reads_them(tmp_path):
    assert len(JSONL) >= 30
    for name, raw in JSONL.items():
        (tmp_path / "x.jsonl").write_bytes(raw)
        assert list(Corpus([tmp_path / "x.jsonl"])) == by_json(raw), name


TEXT: dict[str, bytes] = {
    "plain": b"one\ntwo\n",
    "no final line end": b"one",
    "CRLF": b"one\r\ntwo\r\n",
    "CR": b"one\rtwo",
    "blank": b" \n\t\n",
    "empty": b"",
    "one byte": b"x",
    "one line end": b"\n",
    "mark": b"\xef\xbb\xbfone",
    "mark alone": b"\xef\xbb\xbf",
    "mark inside": "a\ufeffb".encode(),
    "UTF-16 LE": "\ufeffé 日本".encode("utf-16-le"),
    "UTF-16 BE": "\ufeffé 日本".encode("utf-16-be"),
    "UTF-16 pairs": "\ufeff🙂".encode("utf-16-le"),
    "UTF-32 LE": "\ufeffé🙂".encode("utf-32-le"),
    "UTF-32 BE": "\ufeffé🙂".encode("utf-32-be"),
    "UTF-16 long": ("\ufeff" + "é🙂\r\n" * 60_000).encode("utf-16-le"),
    "NUL": b"some text, a\0b, and more text",
    "form feed": b"page\fpage",
    "escape codes": b"\x1b[31mred\x1b[0m",
    "backspaces": b"N\bNA\bAM\bME\bE",
    "vertical tab": b"a\vb",
    "DEL": b"a\x7fb and more of it",
    "C1 controls": "a\x85b\x9fc".encode(),
    "U+2028": "a\u2028b".encode(),
    "combining": "e\u0301".encode(),
    "last code point": "\U0010ffff".encode(),
    "non-character": "\ufffe".encode(),
    "private": "\ue000".encode(),
    "right to left": "\u202eabc".encode(),
    "zero width": "a\u200bb".encode(),
    "replacement": "\ufffd".encode(),
    "one long line": b"x" * 300_000,
    "like JSON": b'{"text": "one"}\n',
    "like a table": b"a,b\n1,2\n",
    "begins as PDF": b"%PDF is a format of pages",
    "begins as rar": b"Rar! she said",
    "begins as bzip2": b"BZh9 is how bzip2 begins",
    "cut at 64 KiB": b"x" * 65_535 + "é".encode() + b"y",
}


def test_texts_are_kept_to_the_byte(tmp_path):
    assert len(TEXT) >= 30
    for name, raw in TEXT.items():
        (tmp_path / "x.txt").write_bytes(raw)
        encoding = next(
            (
                code
                for code in ("utf-32", "utf-16")
                if raw.startswith(
                    {"utf-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-16": (b"\xff\xfe", b"\xfe\xff")}[code]
                )
            ),
            "utf-8",
        )
        assert list(Corpus([tmp_path / "x.txt"])) == [raw.decode(encoding)], name


TEXTS = [f"é {n}" * (n % 7) for n in range(50)]
STRING = pyarrow.string()


def written(
    path: Path, column: Any, row_group_size: int = 20, more: dict[str, Any] | None = None, **options: Any
) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(len(column)), "text": column} | (more or {})),
        path,
        row_group_size=row_group_size,
        **options,
    )


def variants() -> dict[str, Callable[[Path], None]]:
    texts, n = pyarrow.array(TEXTS), len(TEXTS)
    cast = {
        name: texts.cast(kind)
        for name, kind in {
            "large_string": pyarrow.large_string(),
            "string_view": pyarrow.string_view(),
            "binary": pyarrow.binary(),
            "large_binary": pyarrow.large_binary(),
            "binary_view": pyarrow.binary_view(),
            "dictionary": pyarrow.dictionary(pyarrow.int8(), STRING),
            "dictionary of large": pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
            "dictionary of bytes": pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
        }.items()
    }
    beside = {
        "list": pyarrow.array([[1]] * n),
        "struct": pyarrow.array([{"text": "inner"}] * n),
        "map": pyarrow.array([[("k", 1)]] * n, pyarrow.map_(STRING, pyarrow.int64())),
        "nulls": pyarrow.nulls(n),
        "timestamps": pyarrow.array([0] * n, pyarrow.timestamp("ns", "UTC")),
        "decimals": pyarrow.array([1] * n).cast(pyarrow.decimal128(38, 2)),
        "halves": pyarrow.array(np.ones(n, np.float16)),
        "lists of structs": pyarrow.array([[{"text": "x"}]] * n),
        "durations": pyarrow.array([1] * n, pyarrow.duration("s")),
    }
    found: dict[str, Callable[[Path], None]] = {
        name: (lambda p, c=column: written(p, c)) for name, column in cast.items()
    }
    found |= {
        f"beside {name}": (lambda p, c=column: written(p, texts, more={"other": c}))
        for name, column in beside.items()
    }
    found |= {
        f"codec {codec}": (lambda p, c=codec: written(p, texts, compression=c))
        for codec in ("none", "snappy", "gzip", "brotli", "zstd", "lz4")
    }
    found |= {
        name: (lambda p, o=options: written(p, texts, **o))
        for name, options in {
            "no dictionary pages": {"use_dictionary": False},
            "pages of version 2": {"data_page_version": "2.0"},
            "format 1.0": {"version": "1.0"},
            "delta lengths": {
                "use_dictionary": False,
                "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"},
            },
            "delta bytes": {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
            "tiny pages": {"data_page_size": 1},
            "no statistics": {"write_statistics": False},
            "page index": {"write_page_index": True},
            "page checksums": {"write_page_checksum": True},
            "no Arrow schema": {"store_schema": False},
            "row groups of one": {"row_group_size": 1},
            "one row group": {"row_group_size": 1000},
            "full dictionary": {"dictionary_pagesize_limit": 1},
        }.items()
    }
    found |= {
        "column first": lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": texts}), p),
        "required": lambda p: pyarrow.parquet.write_table(
            pyarrow.table([texts], pyarrow.schema([pyarrow.field("text", STRING, nullable=False)])), p
        ),
        "name with a dot beside": lambda p: written(p, texts, more={"text.x": range(n)}),
        "empty row group": empty_row_group,
        "no rows": lambda p: written(p, texts.slice(0, 0)),
        "no row groups": no_row_groups,
        "of chunks": lambda p: written(p, pyarrow.chunked_array([texts.slice(0, 7), texts.slice(7)])),
        "metadata": lambda p: pyarrow.parquet.write_table(
            pyarrow.table({"text": texts}).replace_schema_metadata({"k": "v" * 100_000}), p
        ),
        "extension JSON": lambda p: written(p, pyarrow.ExtensionArray.from_storage(pyarrow.json_(), texts)),
        "sliced": lambda p: written(p, pyarrow.concat_arrays([texts, texts]).slice(13, 30)),
    }
    return found


def empty_row_group(path: Path) -> None:
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)


def no_row_groups(path: Path) -> None:
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("text", STRING)])):
        pass


def as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else value


def test_parquet_reads_as_pyarrow_reads_it(tmp_path, monkeypatch):
    files = variants()
    assert len(files) >= 30
    for name, write in files.items():
        path = tmp_path / "x.parquet"
        write(path)
        want = [as_text(value) for value in pyarrow.parquet.ParquetFile(path).read()["text"].to_pylist()]
        assert list(Corpus([path])) == want, name
        monkeypatch.setattr("megadyn.prepare.units.UNIT_BYTES", 1)  # row group by row group
        assert list(Corpus([path])) == want, name
        monkeypatch.undo()


def test_shards_of_different_schemas_are_read_each_by_its_own(tmp_path):
    for i, column in enumerate(
        [
            pyarrow.array(["a"]),
            pyarrow.array([b"b"]),
            pyarrow.array(["c"]).dictionary_encode(),
            pyarrow.array(["d"], pyarrow.large_string()),
        ]
    ):
        written(tmp_path / f"{i}.parquet", column, more={f"only{i}": [i]})
    assert list(Corpus([tmp_path])) == ["a", "b", "c", "d"]


def test_only_the_damaged_row_group_is_lost(tmp_path):
    path = tmp_path / "x.parquet"
    written(
        path,
        [f"{n} " + random.Random(n).randbytes(50).hex() for n in range(100)],
        row_group_size=20,
        compression="zstd",
        use_dictionary=False,
    )
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    raw = bytearray(path.read_bytes())
    at = chunk.data_page_offset + chunk.total_compressed_size // 2
    raw[at : at + 40] = bytes(40)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"x\.parquet: rows 41 to 60, of row group 2: damaged"):
        list(Corpus([path]))
    corpus = Corpus([path], on_error="skip")
    assert [int(text.split()[0]) for text in corpus] == [*range(40), *range(60, 100)]
    assert corpus.skipped == 1


def test_why_a_parquet_file_is_not_read_is_told(tmp_path):
    path = tmp_path / "x.parquet"
    for column, reason in [
        ([1], "column 'text' holds int64, not text"),
        ([["x"]], "column 'text' holds list<"),
        ([{"x": "y"}], "column 'text' holds struct<"),
    ]:
        written(path, pyarrow.array(column))
        with pytest.raises(UserError, match=re.escape(reason)):
            list(Corpus([path]))
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"]), path)
    with pytest.raises(UserError, match="2 columns 'text'"):
        list(Corpus([path]))
    path.write_bytes(b"PARE" + bytes(20) + b"PARE")
    with pytest.raises(UserError, match="Parquet with an encrypted footer: not supported"):
        list(Corpus([path]))


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow(tmp_path, kind, compression):
    table = pyarrow.table({"id": range(50), "text": TEXTS})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(
        str(tmp_path / "x.arrow"), table.schema, options=options
    ) as out:
        out.write_table(table, max_chunksize=10)
    assert list(Corpus([tmp_path / "x.arrow"])) == TEXTS
    (tmp_path / "untold").write_bytes((tmp_path / "x.arrow").read_bytes())
    assert list(Corpus([tmp_path / "untold"])) == TEXTS
    if kind == "stream":
        (tmp_path / "x.arrow").write_bytes(
            (tmp_path / "x.arrow").read_bytes()[: -len((tmp_path / "x.arrow").read_bytes()) // 3]
        )
        corpus = Corpus([tmp_path / "x.arrow"], on_error="skip")
        assert len(list(corpus)) >= 20
        assert corpus.skipped == 1 and "damaged" in corpus.first_skipped
