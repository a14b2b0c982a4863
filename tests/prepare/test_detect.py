"""Formats are told by content and by suffixes in any case; what is not known is refused by name."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megadyn.errors import UserError
from megadyn.prepare.readers import Corpus

LINE = b'{"text": "one"}\n'


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), sink)
    return sink.getvalue()


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", "hello")
    return sink.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "x.jsonl",
        "x.JSONL",
        "x.ndjson",
        "x.NDJSON",
        "x.json",
        "x.jsonlines",
        "x.jl",
        "x",
        "part-00000",
        "x.jsonl.1",
        "0123abcd.data",
        "x.jsonl.bak",
        "x.jsonl~",
        "web.jsonl-00000-of-00002",
        "x.json_lines",
        "x.v2",
        "x.csv.jsonl",
        "x.JSONL.GZ",
        "x.gz",
        "blob",
    ],
)
def test_json_lines_by_every_name(tmp_path, name):
    content = gzip.compress(LINE, mtime=0) if name.lower().endswith(".gz") or name == "blob" else LINE
    (tmp_path / name).write_bytes(content)
    assert list(Corpus([tmp_path])) == ["one"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "one"}\n{"text": "' + b"1" * 20_000 + b'"}\n',
        b'{"text": "' + b"1" * 20_000 + b'"}\n{"text": "one"}\n',
        b'{"text": "one", "other": NaN}\n',
        b"\n \n" + LINE,
        b"\xef\xbb\xbf" + LINE,
        LINE.decode().encode("utf-16"),
        LINE.decode().encode("utf-16-le"),
    ],
    ids=["short", "long", "NaN", "blank first", "mark", "UTF-16", "UTF-16 without mark"],
)
def test_json_lines_by_content_alone(tmp_path, content):
    (tmp_path / "part-00000").write_bytes(content)
    assert "one" in list(Corpus([tmp_path]))


@pytest.mark.parametrize("content", [b"{ some text }\n", b'{"a" b}\n', b'"one"\n', b"[1]\n"])
def test_what_only_looks_like_json_is_text(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert list(Corpus([tmp_path])) == [content.decode()]


@pytest.mark.parametrize("name", ["x.parquet", "x.PARQUET", "x.pq", "x", "x.dat", "x.json"])
def test_parquet_by_every_name(tmp_path, name):
    (tmp_path / name).write_bytes(parquet())
    assert list(Corpus([tmp_path])) == ["one"]


@pytest.mark.parametrize(
    "name", ["x.txt", "X.TXT", "x", "x.py", "Makefile", "x.log", "x.html", "x.unheard-of"]
)
def test_text_by_every_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"some {text}\n")
    assert list(Corpus([tmp_path])) == ["some {text}\n"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.csv", b"a,b\n1,2\n", "a table of comma-separated values: not supported"),
        ("X.TSV", b"a\tb\n1\t2\n", "a table of tab-separated values: not supported"),
        ("x.csv.1", b"a,b\n1,2\n", "a table of comma-separated values: not supported"),
        ("X.CSV~", b"a,b\n1,2\n", "a table of comma-separated values: not supported"),
        ("x.ipynb", b'{"cells": []}\n', "a notebook: not supported"),
        ("x.csv.gz", gzip.compress(b"a,b\n", mtime=0), "a table of comma-separated values: not supported"),
        ("x.tar", tar(), "a tar archive: not supported"),
        ("x", tar(), "a tar archive: not supported"),
        ("x.tar.gz", gzip.compress(tar(), mtime=0), "a tar archive: not supported"),
        ("x.tgz", gzip.compress(tar(), mtime=0), "a tar archive: not supported"),
        ("x.zip", zipped(), "a zip archive: not supported"),
        ("x.docx", zipped(), "a zip archive: not supported"),
        ("x.pdf", b"%PDF-1.4\n\x00\x01\x02\x03\x00\x00", "PDF: not supported"),
        ("x.png", b"\x89PNG\r\n\x1a\n", "an image: not supported"),
        (
            "x.bin",
            bytes(range(256)) * 4,
            "unknown format (known are UTF-8 text, JSON lines, Parquet and Arrow",
        ),
        ("x.Z", b"\x1f\x9d\x90a", "a file of compress (.Z): not supported"),
        (
            "x.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a pointer of Git LFS, whose content was not",
        ),
        ("x.txt.gz", b"plain", "its name says gzip, but its content is not"),
        # gzip -d would read a zip archive of one file, and zstd -d frames of older formats.
        ("x.txt.gz", zipped(), "its name says gzip, but it is a zip archive"),
        (
            "x.txt.zst",
            b"\x27\xb5\x2f\xfd\0\0",
            "its name says zstd, but it is zstd of format 0.7, older than",
        ),
        ("x", b"\x24\xb5\x2f\xfd\0\0", "zstd of format 0.4, older than its standard: not supported"),
        (
            "x.parquet.zst",
            pyarrow.compress(parquet(), "zstd", asbytes=True),
            "Parquet compressed as a whole: decompress the file first",
        ),
        ("x.json", b'[\n{"text": "one"}\n]', "one JSON array, not one object per line"),
        ("x.json", b'[{"text": "one"}]', "a JSON array per line"),
        ("x.json", b'{\n  "text": "one"\n}\n', "a JSON object over several lines, not one per line"),
    ],
)
def test_what_is_not_read_is_refused_by_name_before_anything_is(tmp_path, name, content, reason):
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        Corpus([tmp_path]).units()
    assert str(refused.value).startswith(f"{tmp_path / name}: {reason}")
    corpus = Corpus([tmp_path], on_error="skip")
    assert list(corpus) == ["before"]
    assert corpus.skipped == 1 and reason in corpus.first_skipped


@pytest.mark.parametrize("content", [tar(), zipped(), parquet(), b"\x89PNG\r\n"])
def test_a_name_of_text_does_not_make_a_text(tmp_path, content):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.txt: not (UTF-8|text)"):
        list(Corpus([tmp_path / "x.txt"]))


def test_a_forced_format_stands(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n")
    assert list(Corpus([tmp_path], form="text")) == ["a,b\n"]


def test_hidden_files_and_metadata_are_left_out_of_folders_and_counted(tmp_path, logged):
    repository = tmp_path / "repository"
    for name in (
        ".cache/huggingface/x.metadata",
        ".git/config",
        ".gitattributes",
        "README.md",
        "data/README.md",
        "data/a.txt",
        "data/.hidden.txt",
        "data/_SUCCESS",
        "data/_code.py",
        "dataset_infos.json",
    ):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(name)
    assert list(Corpus([repository])) == ["data/README.md", "data/_code.py", "data/a.txt"]
    assert logged.messages == ["left out of the folders: 4 hidden, 3 metadata"]
    assert list(Corpus([repository / "README.md", repository / "data" / ".hidden.txt"])) == [
        "README.md",
        "data/.hidden.txt",
    ]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "README.md").write_text("of a program")
    assert list(Corpus([tmp_path / "code"])) == ["of a program"]


def test_the_hubs_cache_and_clones_are_known(tmp_path):
    snapshot = tmp_path / "datasets--x" / "snapshots" / ("0" * 40)
    clone = tmp_path / "clone"
    for folder in (snapshot, clone):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("a card")
        (folder / "a.txt").write_text("a text")
    (clone / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    assert list(Corpus([snapshot, clone])) == ["a text", "a text"]


def save_to_disk(folder: Path, texts: list[str], **state: object) -> None:
    """As datasets does, with the leftover of a map() beside."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    table = pyarrow.table({"text": texts})
    for name, part in [(names[0], table.slice(0, 2)), (names[1], table.slice(2)), ("cache-1.arrow", table)]:
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as out:
            out.write_table(part)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]} | state)
    )


def test_saved_datasets_are_read(tmp_path):
    save_to_disk(tmp_path / "all" / "train", ["a", "b", "c"])
    save_to_disk(tmp_path / "all" / "validation", ["d", "e", "f"])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert list(Corpus([tmp_path / "all" / "train"])) == ["a", "b", "c"]
    assert list(Corpus([tmp_path / "all"])) == ["a", "b", "c", "d", "e", "f"]
    save_to_disk(tmp_path / "chosen", ["a"], _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(UserError, match="a selection of its rows"):
        Corpus([tmp_path / "chosen"])


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: neither a file nor a folder"):
        Corpus([tmp_path])
