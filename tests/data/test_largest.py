"""Token ids that a model has no row for are refused before a run starts."""

import os

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.largest import check_ids, id_range
from megadyn.errors import UserError


def written(prefix, ids, dtype="<i4") -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        writer.add(np.array(ids, np.int64), [len(ids)], [1])
        writer.finish()
    return IndexedDataset(prefix)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", "<u2", "<i4", "<i8"])
@pytest.mark.parametrize("mmap", [True, False])
def test_the_range_is_that_of_all_tokens(tmp_path, monkeypatch, dtype, mmap):
    monkeypatch.setattr("megadyn.data.largest.CHUNK_TOKENS", 7)
    ids = np.random.default_rng(0).integers(0, 120, 50)
    ids[[3, 49]] = 121, 126
    written(tmp_path / "x", ids, dtype)
    assert id_range(IndexedDataset(tmp_path / "x", mmap=mmap)) == (0, 126)


def test_ids_without_a_row_are_refused_in_a_sentence_that_says_why(tmp_path):
    dataset = written(tmp_path / "x", [1, 299, 2])
    assert check_ids(dataset, 300) == (0, 299)
    with pytest.raises(UserError) as refused:
        check_ids(dataset, 299)
    assert str(refused.value) == (
        f"dataset {tmp_path / 'x'}: its largest token id is 299, but the model's vocabulary has 299 ids (0 to 298); it was "
        "probably made with another tokenizer than the one configured, or model.vocab_size is too small"
    )
    with pytest.raises(UserError, match="negative token id -5"):
        check_ids(written(tmp_path / "y", [1, -5]), 300)
    assert check_ids(written(tmp_path / "z", []), 300) == (0, -1)


def test_tokens_are_read_once_and_again_when_the_file_changed(tmp_path, monkeypatch, logged):
    dataset = written(tmp_path / "x", [7, 8, 9])
    assert id_range(dataset, tmp_path / "cache").largest == 9
    (entry,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("megadyn.data.largest._scan", lambda *_: pytest.fail("read again"))
    assert id_range(IndexedDataset(tmp_path / "x"), tmp_path / "cache").largest == 9
    monkeypatch.undo()
    entry.write_text('{"largest": ')
    assert id_range(dataset, tmp_path / "cache").largest == 9
    assert any("is damaged and will be rebuilt" in message for message in logged.messages)
    np.array([7, 5000, 9], "<i4").tofile(tmp_path / "x.bin")
    os.utime(tmp_path / "x.bin", ns=(1, 1))
    assert id_range(IndexedDataset(tmp_path / "x"), tmp_path / "cache").largest == 5000


def test_where_nothing_can_be_kept_every_start_reads(tmp_path, logged):
    dataset = written(tmp_path / "x", [7, 8, 9])
    (tmp_path / "cache").write_text("a file, no folder")
    assert id_range(dataset, tmp_path / "cache").largest == 9
    assert "cannot be cached" in logged.messages[-1]
