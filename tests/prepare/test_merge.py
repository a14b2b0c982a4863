"""Merging: one dataset behind the other, byte for byte what one writer makes of all."""

import resource
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.errors import UserError
from megadyn.prepare.merge import merge_datasets

PARTS = [[[3], [0, 2]], [], [[], [1], []], [[0]], [[5, 4, 3], [2]]]
"""Datasets of documents of sequences, by length: empty ones of each kind, and several sequences a document."""


def test_merged_equals_written_at_once(tmp_path, write_dataset):
    everything = [document for part in PARTS for document in part]
    lengths = [length for document in everything for length in document]
    tokens = np.concatenate([np.arange(sum(map(sum, part))) for part in PARTS])
    with IndexedWriter(tmp_path / "whole", "<i4") as writer:
        writer.add(tokens, lengths, [len(document) for document in everything])
        writer.finish()
    prefixes = [write_dataset(part, name=f"part{i}").prefix for i, part in enumerate(PARTS)]
    merged = merge_datasets(prefixes, tmp_path / "merged")
    assert (merged.num_documents, len(merged), merged.num_tokens) == (
        len(everything),
        len(lengths),
        sum(lengths),
    )
    for kind in ("bin", "idx"):
        assert Path(f"{merged.prefix}.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


def test_more_datasets_than_files_may_be_open(tmp_path, write_dataset):
    prefixes = [write_dataset([[n]], name=f"part{n}").prefix for n in range(60)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 30, limits[1]))
    try:
        merged = merge_datasets(prefixes, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert merged.sizes.tolist() == list(range(60))


def test_a_dataset_that_changes_while_it_is_copied_is_refused(tmp_path, write_dataset):
    dataset = write_dataset([[5]])
    with (tmp_path / "dataset.bin").open("ab") as tokens:
        tokens.write(b"more")
    with (
        IndexedWriter(tmp_path / "merged", "<i4") as writer,
        pytest.raises(UserError, match=r"dataset\.bin: changed while"),
    ):
        writer.add_dataset(dataset)
    assert not list(tmp_path.glob("*merged*"))


def test_a_damaged_dataset_among_them_stops_it_before_anything_is_copied(
    tmp_path, write_dataset, monkeypatch
):
    monkeypatch.setattr(IndexedWriter, "add_file", None)
    prefixes = [write_dataset([[n]], name=f"part{n}").prefix for n in range(3)]
    (tmp_path / "part2.bin").write_bytes(b"1234567")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"part2\.bin: 7 bytes, but its index describes 8"):
        merge_datasets(prefixes, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_merged_datasets_beyond_2_32_bytes_have_their_offsets_right(tmp_path, monkeypatch):
    """Sparse ones of 2^31 - 1 tokens; their zeros are counted, not copied."""
    for name in ("a", "b", "c"):
        with IndexedWriter(tmp_path / name, "<u2") as writer:
            writer._bin.seek(2 * (2**31 - 1))
            writer._add_counts(np.array([2**31 - 1]), np.array([1]))
            writer.finish()
    monkeypatch.setattr(
        IndexedWriter, "_copy", lambda writer, tokens, copied: writer._bin.seek(tokens.seek(0, 2), 1)
    )
    merged = merge_datasets([tmp_path / name for name in ("a", "b", "c")], tmp_path / "abc")
    assert merged.num_tokens == 3 * (2**31 - 1)
    assert merged.starts(np.arange(3)).tolist() == [0, 2**31 - 1, 2 * (2**31 - 1)]
    assert len(IndexedDataset(tmp_path / "abc").document(2)) == 2**31 - 1
