import json
import os
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megadyn.errors import UserError
from megadyn.prepare.readers import Corpus


def jsonl(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    return path


def test_folder_is_walked_in_the_order_of_names(tmp_path):
    for name, text in [
        ("b.txt", "b"),
        ("a/z.py", "a/z"),
        ("a/c/d", "a/c/d"),
        ("c.jsonl", '{"text": "1"}\n{"text": "2"}'),
        ("B.txt", "B"),
        ("d.json", '{"text": "3"}'),
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(Corpus([tmp_path])) == ["B", "a/c/d", "a/z", "b", "1", "2", "3"]


def test_text_is_kept_to_the_byte(tmp_path):
    text = "﻿first\r\nsecond\rthird\u2028\0 end"
    (tmp_path / "x").write_bytes(text.encode())
    assert list(Corpus([tmp_path / "x", tmp_path / "x"])) == [text, text]


def test_jsonl_escapes_line_ends_and_blank_lines(tmp_path):
    path = jsonl(
        tmp_path, b'{"text": "a\\nb \\ud83d\\ude42"}\r\n\n  \n{"id": 1, "text": ""}\n{"text": "\xc3\xa9"}'
    )
    assert list(Corpus([path])) == ["a\nb 🙂", "", "é"]


def test_text_key_and_forced_format(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text('{"content": "x", "text": "y"}')
    assert list(Corpus([path], form="jsonl", text_key="content")) == ["x"]
    assert list(Corpus([jsonl(tmp_path, b"{oops")], form="text")) == ["{oops"]


BAD_LINES = {
    b"{oops": "invalid JSON",
    b'{"text": "cut': "invalid JSON",
    b'{"text": "a"} {"text": "b"}': "invalid JSON",
    b'{"text": NaN}': "'text' holds float",
    b'{"text": "\xff"}': "UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b'["text"]': "not a JSON object but list",
    b'{"body": "a"}': "no key 'text' (its keys: body)",
    b'{"text": 5}': "'text' holds int",
    b'{"text": null}': "'text' holds NoneType",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_bad_line_is_named_with_file_and_number(tmp_path, line, reason):
    path = jsonl(tmp_path, b'{"text": "one"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(UserError) as caught:
        list(Corpus([path]))
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)

    corpus = Corpus([path], on_error="skip")
    assert list(corpus) == ["one", "last"]
    assert corpus.skipped == 1
    assert f"{path}:3: " in str(corpus.first_skipped)


def test_skipped_documents_are_those_of_the_last_pass(tmp_path):
    corpus = Corpus([jsonl(tmp_path, b"1\n2\n")], on_error="skip")
    assert [list(corpus), list(corpus)] == [[], []]
    assert corpus.skipped == 2


def test_undecodable_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"b\.txt: not UTF-8 \(byte 3"):
        list(Corpus([tmp_path]))
    corpus = Corpus([tmp_path], on_error="skip")
    assert list(corpus) == ["fine"]
    assert corpus.skipped == 1


def test_missing_path_raises_at_once_even_when_skipping(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file"):
        Corpus([tmp_path / "nowhere"], on_error="skip")


def test_broken_and_circular_links_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "a" / "link")
    with pytest.raises(UserError, match=r"link: No such file"):
        list(Corpus([tmp_path]))
    (tmp_path / "a" / "link").unlink()
    os.symlink(tmp_path, tmp_path / "a" / "up")
    with pytest.raises(UserError, match=r"up: a link to one of its own parent"):
        list(Corpus([tmp_path]))


def test_jsonl_is_streamed(tmp_path):
    path = jsonl(tmp_path, b'{"text": "first"}\nbroken\n')
    assert next(iter(Corpus([path]))) == "first"


def compressed(path: Path, *contents: bytes) -> Path:
    """Each content as a gzip member or a zstd frame of its own."""
    codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    path.write_bytes(b"".join(pyarrow.compress(content, codec, asbytes=True) for content in contents))
    return path


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_are_read_to_the_end_of_the_last_member(tmp_path, suffix):
    first, second = b'{"text": "one"}\n{"te', b'xt": "two"}\n{"text": "three"}'
    compressed(tmp_path / f"a.jsonl.{suffix}", first, second)
    compressed(tmp_path / f"b.txt.{suffix}", "é".encode()[:1], "é".encode()[1:] + b"\r\n")
    (tmp_path / f"c.jsonl.{suffix}").write_bytes(b"")
    assert list(Corpus([tmp_path])) == ["one", "two", "three", "é\r\n"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_damaged_compressed_file_is_an_error_or_a_counted_skip(tmp_path, suffix, form):
    lines = b"".join(b'{"text": "%d"}\n' % n for n in range(20_000))
    path = compressed(tmp_path / f"a.{form}.{suffix}", lines)
    path.write_bytes(path.read_bytes()[:-20])
    compressed(tmp_path / "b.txt.gz", b"last")
    with pytest.raises(UserError, match=rf"a\.{form}\.{suffix}(:\d+)?: damaged \(cut short\)"):
        list(Corpus([tmp_path]))
    corpus = Corpus([tmp_path], on_error="skip")
    *kept, last = corpus
    assert (corpus.skipped, last) == (1, "last")
    assert kept == [str(n) for n in range(len(kept))]  # what stands before the damage
    assert len(kept) > 10_000 if form == "jsonl" else not kept

    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"b\.txt\.gz: its name says gzip, but its content is not"):
        list(Corpus([tmp_path / "b.txt.gz"]))


def table(path: Path, row_group_size: int = 3, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet_rows(tmp_path, kind):
    texts = [f"é {n}" * (n % 5) for n in range(20)]
    path = table(tmp_path / "a.parquet", id=list(range(20)), text=pyarrow.array(texts).cast(kind))
    assert list(Corpus([path])) == texts
    assert list(Corpus([table(tmp_path / "b", body=["x"])], form="parquet", text_key="body")) == ["x"]


def test_parquet_without_rows(tmp_path):
    nothing = pyarrow.array([], pyarrow.string())
    table(tmp_path / "a.parquet", text=nothing)
    with pyarrow.parquet.ParquetWriter(tmp_path / "b.parquet", pyarrow.schema([("text", pyarrow.string())])):
        pass
    table(tmp_path / "c.parquet", text=["last"])
    assert list(Corpus([tmp_path])) == ["last"]


def test_bad_parquet_rows_are_named(tmp_path, monkeypatch):
    raw = pyarrow.array([b"a", b"caf\xe9", None, b"d", None, b"f"]).view(pyarrow.string())
    path = table(tmp_path / "a.parquet", row_group_size=4, text=raw)
    with pytest.raises(UserError, match=r"a\.parquet: row 2: not UTF-8 \(byte 3"):
        list(Corpus([path]))
    corpus = Corpus([path], on_error="skip")
    assert list(corpus) == ["a", "d", "f"]
    assert corpus.skipped == 3
    monkeypatch.setattr("megadyn.prepare.units.UNIT_BYTES", 1)
    fails = Corpus([table(tmp_path / "b.parquet", row_group_size=2, text=["a", "b", "c", None])])
    assert len(fails.units()) == 2
    with pytest.raises(UserError, match=r"b\.parquet: row 4: null, not text"):
        list(fails.read(fails.units()[-1]))


def test_unreadable_parquet_files_are_named(tmp_path):
    good = table(tmp_path / "good.parquet", text=["a"] * 10)
    table(tmp_path / "column.parquet", body=["x"])
    table(tmp_path / "numbers.parquet", text=[1])
    (tmp_path / "none.parquet").write_bytes(b"text")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-30])
    for name, reason in [
        ("column", "no column 'text' (its columns: body)"),
        ("numbers", "column 'text' holds int64, not text"),
        ("none", "cannot be read as Parquet"),
        ("empty", "cannot be read as Parquet"),
        ("cut", "cannot be read as Parquet"),
    ]:
        path = tmp_path / f"{name}.parquet"
        with pytest.raises(UserError, match=re.escape(f"{path}: {reason}")):
            list(Corpus([path]))
        corpus = Corpus([path, good], on_error="skip")
        assert (len(list(corpus)), corpus.skipped) == (10, 1)


def test_every_line_belongs_to_one_unit_wherever_the_cuts_fall(tmp_path, monkeypatch):
    draw = random.Random(0)
    for trial in range(40):
        lines = [
            draw.choice(["", "  ", json.dumps({"text": "x" * draw.randrange(60)}), "broken"])
            for _ in range(30)
        ]
        path = jsonl(
            tmp_path, draw.choice(["\n", "\r\n"]).join(lines).encode() + draw.choice([b"", b"\n", b"\n\n"])
        )
        corpus = Corpus([path], on_error="skip")
        monkeypatch.setattr("megadyn.prepare.units.UNIT_BYTES", 2**20)
        whole, skipped, first = list(corpus), corpus.skipped, corpus.first_skipped
        monkeypatch.setattr("megadyn.prepare.units.UNIT_BYTES", draw.randrange(1, 200))
        assert [list(corpus), corpus.skipped, corpus.first_skipped] == [whole, skipped, first], trial
        assert corpus.consumed == path.stat().st_size


def test_a_bad_line_far_into_the_file_has_its_own_number(tmp_path, monkeypatch):
    monkeypatch.setattr("megadyn.prepare.units.UNIT_BYTES", 64)
    path = jsonl(
        tmp_path, b'{"text": "0123456789"}\n\n' * 50 + b"broken\n" + b'{"text": "0123456789"}\n' * 50
    )
    unit = next(unit for unit in Corpus([path]).units() if unit[0].end > 50 * 24)
    assert unit[0].first > 0
    with pytest.raises(UserError, match=r"lines\.jsonl:101: invalid JSON"):
        list(Corpus([path]).read(unit))


def test_units_are_bounded_and_gather_small_files(tmp_path, monkeypatch):
    monkeypatch.setattr("megadyn.prepare.units.UNIT_BYTES", 100)
    for n in range(30):
        (tmp_path / f"{n:02}.txt").write_text("x" * 10)
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 50)
    units = Corpus([tmp_path]).units()
    assert [len(unit) for unit in units] == [10, 10, 10, *[1] * 7]
    monkeypatch.setattr("megadyn.prepare.units.MOST_UNITS", 4)
    assert len(Corpus([tmp_path]).units()) <= 4


def test_a_line_over_the_limit_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megadyn.prepare.formats.LONGEST_DOCUMENT", 100)
    path = jsonl(tmp_path, b'{"text": "a"}\n{"text": "%s"}\n{"text": "b"}\n' % (b"x" * 5000))
    corpus = Corpus([path], on_error="skip")
    assert list(corpus) == ["a", "b"]
    assert corpus.skipped == 1
    assert str(corpus.first_skipped) == f"{path}:2: a line of over 100 bytes"
    (tmp_path / "long.txt").write_text("x" * 101)
    with pytest.raises(UserError, match=r"long\.txt: a text of over 100 bytes"):
        list(Corpus([tmp_path / "long.txt"]))


def test_patterns_stand_for_what_they_match(tmp_path):
    for name in ("b1.txt", "a1.txt", "c.txt", "deep/a2.txt", "deep/er/a3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(Corpus([tmp_path / "?1.txt"])) == ["a1.txt", "b1.txt"]
    assert list(Corpus([tmp_path / "**" / "a*"])) == ["a1.txt", "deep/a2.txt", "deep/er/a3.txt"]
    assert list(Corpus([tmp_path / "d*"])) == ["deep/a2.txt", "deep/er/a3.txt"]
    assert len(list(Corpus([tmp_path / "**"]))) == 5
    (tmp_path / "[x].txt").write_text("a name, no pattern")
    assert list(Corpus([tmp_path / "[x].txt"])) == ["a name, no pattern"]
    with pytest.raises(UserError, match=r"z\*: no such file"):
        Corpus([tmp_path / "z*"])
