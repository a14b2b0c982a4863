import os
from pathlib import Path

import pytest

from megadyn.data.readers import Corpus
from megadyn.errors import UserError


def jsonl(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    return path


def test_folder_is_walked_in_the_order_of_names(tmp_path):
    for name, text in [("b.txt", "b"), ("a/z.py", "a/z"), ("a/c/d", "a/c/d"), ("c.jsonl", '{"text": "1"}\n{"text": "2"}'),
                       ("B.txt", "B"), ("d.json", '{"text": "3"}')]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(Corpus([tmp_path])) == ["B", "a/c/d", "a/z", "b", "1", "2", "3"]


def test_text_is_kept_to_the_byte(tmp_path):
    text = "﻿first\r\nsecond\rthird\u2028\0 end"
    (tmp_path / "x").write_bytes(text.encode())
    assert list(Corpus([tmp_path / "x", tmp_path / "x"])) == [text, text]


def test_jsonl_escapes_line_ends_and_blank_lines(tmp_path):
    path = jsonl(tmp_path, b'{"text": "a\\nb \\ud83d\\ude42"}\r\n\n  \n{"id": 1, "text": ""}\n{"text": "\xc3\xa9"}')
    assert list(Corpus([path])) == ["a\nb 🙂", "", "é"]


def test_text_key_and_forced_format(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text('{"content": "x", "text": "y"}')
    assert list(Corpus([path], form="jsonl", text_key="content")) == ["x"]
    assert list(Corpus([jsonl(tmp_path, b"{oops")], form="text")) == ["{oops"]


BAD_LINES = {
    b"{oops": "no JSON",
    b'{"text": "cut': "no JSON",
    b'{"text": "a"} {"text": "b"}': "no JSON",
    b'{"text": NaN}': "no JSON",
    b'{"text": "\xff"}': "UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b'["text"]': "no JSON object but list",
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
    with pytest.raises(UserError, match=r"b\.txt: no UTF-8 text \(byte 3"):
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
    with pytest.raises(UserError, match=r"up: a link that leads back"):
        list(Corpus([tmp_path]))


def test_jsonl_is_streamed(tmp_path):
    path = jsonl(tmp_path, b'{"text": "first"}\nbroken\n')
    assert next(iter(Corpus([path]))) == "first"
