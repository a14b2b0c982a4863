import dataclasses
import os
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset, check_tokenizer, dtype_for
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.inspection import length_histogram, verify
from megadyn.data.record import Record
from megadyn.errors import UserError
from megadyn.tokenization.tokenizer import load_tokenizer

Documents = list[list[list[int]]]  # documents of sequences of ids

CASES: dict[str, tuple[Documents, str]] = {
    "usual": ([[[1, 2, 3]], [[4]], [[5, 6]]], "H"),
    "one token": ([[[0]]], "H"),
    "empty documents": ([[], [[7, 8]], [], [], [[9]], []], "H"),
    "no tokens": ([[], []], "H"),
    "empty sequences": ([[[], [1, 2], []], [[]], [[3], []]], "i"),
    "several sequences": ([[[1], [2, 3], [4, 5, 6]], [[7], [8]]], "i"),
    "extremes of uint16": ([[[0, 65535]], [[65535, 0]]], "H"),
    "extremes of int32": ([[[0, 2**31 - 1]]], "i"),
}
CODES = {"H": (8, "<u2"), "i": (4, "<i4")}  # struct letter: dtype code of the format, numpy name


def files_by_hand(documents: Documents, letter: str) -> tuple[bytes, bytes]:
    """(.bin, .idx) as facts of the format alone give them, one number at a time."""
    sequences = [sequence for document in documents for sequence in document]
    tokens = b"".join(struct.pack(f"<{letter}", token) for sequence in sequences for token in sequence)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[letter][0])
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(documents) + 1)
    for sequence in sequences:
        index += struct.pack("<i", len(sequence))
    offset = 0
    for sequence in sequences:
        index += struct.pack("<q", offset)
        offset += len(sequence) * struct.calcsize(letter)
    boundary = 0
    index += struct.pack("<q", boundary)
    for document in documents:
        boundary += len(document)
        index += struct.pack("<q", boundary)
    return tokens, index


def put(prefix: Path, tokens: bytes, index: bytes) -> Path:
    Path(f"{prefix}.bin").write_bytes(tokens)
    Path(f"{prefix}.idx").write_bytes(index)
    return prefix


def write(prefix: Path, *documents: list[int]) -> None:
    """A uint16 dataset of documents of one sequence each, added one by one."""
    with IndexedWriter(prefix, "<u2") as writer:
        for ids in documents:
            writer.add(np.array(ids), [len(ids)], [1])
        writer.finish()


def record(**changes: object) -> Record:
    byte = load_tokenizer("byte")
    made = Record(
        tokenizer="byte",
        fingerprint=byte.fingerprint,
        vocab_size=257,
        eod=256,
        append_eod=False,
        documents=1,
        sequences=1,
        tokens=3,
        sha256="",
        skipped=0,
        source=["x"],
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(("documents", "letter"), CASES.values(), ids=CASES)
def test_writer_makes_the_bytes_of_the_format(tmp_path, documents, letter):
    with IndexedWriter(tmp_path / "deep" / "er" / "x", CODES[letter][1]) as writer:
        for document in documents:
            ids = np.array([token for sequence in document for token in sequence], np.int64)
            writer.add(ids, [len(sequence) for sequence in document], [len(document)])
        writer.finish()
    tokens, index = files_by_hand(documents, letter)
    folder = tmp_path / "deep" / "er"
    assert sorted(path.name for path in folder.iterdir()) == ["x.bin", "x.idx"]
    assert (folder / "x.bin").read_bytes() == tokens
    assert (folder / "x.idx").read_bytes() == index


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "plain"])
@pytest.mark.parametrize(("documents", "letter"), CASES.values(), ids=CASES)
def test_reader_reads_the_bytes_of_the_format(tmp_path, documents, letter, mmap):
    dataset = IndexedDataset(put(tmp_path / "x", *files_by_hand(documents, letter)), mmap=mmap)
    sequences = [sequence for document in documents for sequence in document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
    assert [dataset.document(k).tolist() for k in range(dataset.num_documents)] == [
        list(chain(*d)) for d in documents
    ]
    assert dataset.sizes.tolist() == [len(sequence) for sequence in sequences]
    assert dataset.document_index.tolist() == np.cumsum([0] + [len(d) for d in documents]).tolist()
    assert dataset.tokens[:].tolist() == list(chain(*sequences))
    assert dataset.num_tokens == len(dataset.tokens)
    assert dataset.dtype == CODES[letter][1]
    assert dataset.record is None
    for beyond in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[beyond]


@pytest.mark.parametrize("code", [1, 2, 3, 5])
def test_reader_knows_the_other_integer_types(tmp_path, code):
    letter = {1: "B", 2: "b", 3: "h", 5: "q"}[code]
    tokens, index = (
        struct.pack(f"<3{letter}", 1, 2, 100),
        struct.pack("<QBQQ", 1, code, 1, 2) + struct.pack("<iqqq", 3, 0, 0, 1),
    )
    dataset = IndexedDataset(put(tmp_path / "x", tokens, b"MMIDIDX\0\0" + index))
    assert dataset[0].tolist() == [1, 2, 100]


def test_every_truncation_is_noticed(tmp_path):
    tokens, index = files_by_hand([[[1, 2], []], [], [[3]]], "H")
    for cut in range(len(index)):
        with pytest.raises(UserError, match=r"x\.idx: "):
            IndexedDataset(put(tmp_path / "x", tokens, index[:cut]))
    for damaged in (tokens[:-1], tokens[:-2], b"", tokens + b"\0\0"):
        with pytest.raises(UserError, match=r"x\.bin: .* bytes, but its index describes 6"):
            IndexedDataset(put(tmp_path / "x", damaged, index))


def test_every_flipped_bit_is_noticed_or_changes_no_bound(tmp_path):
    """Whatever is in the file, opening raises `UserError` or gives a dataset that reads within its file."""
    tokens, index = files_by_hand([[[1, 2], []], [], [[3], [4, 5]]], "H")
    refused = 0
    for bit in range(8 * len(index)):
        damaged = bytearray(index)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            dataset = IndexedDataset(put(tmp_path / "x", tokens, bytes(damaged)))
        except UserError:
            refused += 1
            continue
        assert sum(len(dataset[i]) for i in range(len(dataset))) == dataset.num_tokens
        assert sum(len(dataset.document(k)) for k in range(dataset.num_documents)) == dataset.num_tokens
    # What may pass: dtype int16 for uint16, and the two inner boundaries moved between their neighbours.
    assert refused >= 8 * len(index) - 10


def replaced(index: bytes, at: int, count: int, new: bytes) -> bytes:
    return index[:at] + new + index[at + count :]


DAMAGES = {
    "noise": lambda index, at, rng: replaced(index, at, 8, rng.bytes(8)),
    "extremes": lambda index, at, rng: replaced(
        index, at, 8, struct.pack("<q", rng.choice([-1, 0, 1, 2**31, 2**62, -(2**63), 2**63 - 1]))
    ),
    "put in": lambda index, at, rng: replaced(index, at, 0, rng.bytes(rng.integers(1, 20))),
    "taken out": lambda index, at, rng: replaced(index, at, rng.integers(1, 20), b""),
    "all noise": lambda index, at, rng: index[:9] + rng.bytes(len(index) - 9),
}


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "plain"])
def test_no_damage_leads_outside_the_file(tmp_path, mmap):
    """Whatever is in the index: a sentence that names it, or a dataset that holds together."""
    rng = np.random.default_rng(0)
    opened, messages = 0, []
    for damage in [*DAMAGES.values()] * 40:
        documents = [
            [rng.integers(0, 99, rng.integers(0, 4)).tolist() for _ in range(rng.integers(0, 3))]
            for _ in range(4)
        ]
        tokens, index = files_by_hand(documents, "H")
        damaged = damage(index, int(rng.integers(len(index))), rng)
        try:
            dataset = IndexedDataset(put(tmp_path / "x", tokens, damaged), mmap=mmap)
        except UserError as error:
            messages.append(str(error))
            continue
        opened += 1
        assert (
            sum(len(dataset[i]) for i in range(len(dataset))) == dataset.num_tokens == len(dataset.tokens[:])
        )
        assert sum(len(dataset.document(k)) for k in range(dataset.num_documents)) == dataset.num_tokens
        assert dataset.tokens[:].nbytes == len(tokens)
    assert 0 < opened < 50  # most damage is noticed; a boundary moved between its neighbours is not
    assert all(str(tmp_path / "x") in message for message in messages)


def test_a_file_that_shrinks_under_a_plain_reader_is_an_error(tmp_path):
    dataset = IndexedDataset(put(tmp_path / "x", *files_by_hand([[[1, 2, 3]]], "H")), mmap=False)
    assert dataset[0].tolist() == [1, 2, 3]
    (tmp_path / "x.bin").write_bytes(b"\1\0\2")
    with pytest.raises(UserError, match=r"x\.bin: ends at byte 3; it became shorter while it was read"):
        dataset[0]
    with pytest.raises(ValueError, match="step 2"):
        dataset.tokens[::2]


def open_handles(path: Path) -> int:
    """How often this process has `path` open."""
    with os.scandir("/proc/self/fd") as handles:
        links = [entry.path for entry in handles]
    return sum(os.path.exists(link) and os.path.samefile(link, path) for link in links)


def test_a_plain_reader_keeps_no_file_open_behind_it(tmp_path):
    put(tmp_path / "x", *files_by_hand([[[1, 2, 3]]], "H"))
    datasets = [IndexedDataset(tmp_path / "x", mmap=False) for _ in range(10)]
    assert open_handles(tmp_path / "x.bin") == 10
    first = datasets[0][0]
    datasets.clear()
    assert open_handles(tmp_path / "x.bin") == open_handles(tmp_path / "x.idx") == 0
    assert first.tolist() == [1, 2, 3]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_offsets_are_checked_over_the_borders_of_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("megadyn.data.indexed.CHUNK_SEQUENCES", chunk)
    tokens, index = files_by_hand([[[1, 2]], [[]], [[3]], [[4, 5]], [[6]]], "i")
    assert [
        ids.tolist() for ids in map(IndexedDataset(put(tmp_path / "x", tokens, index)).document, range(5))
    ] == [[1, 2], [], [3], [4, 5], [6]]
    for sequence in range(5):
        damaged = bytearray(index)
        damaged[34 + 20 + 8 * sequence] += 4
        with pytest.raises(
            UserError, match=f"sequence {sequence} is at byte {damaged[34 + 20 + 8 * sequence]}, but"
        ):
            IndexedDataset(put(tmp_path / "x", tokens, bytes(damaged)))
        damaged = bytearray(index)
        damaged[34 + 4 * sequence + 3] = 0x80
        with pytest.raises(UserError, match=f"sequence {sequence} has a negative length"):
            IndexedDataset(put(tmp_path / "x", tokens, bytes(damaged)))


@pytest.mark.parametrize(
    ("at", "what", "sentence"),
    [
        (0, b"PAR1", "not the index of a dataset"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "dtype code 7 is not an integer type"),
        (17, b"\x63", "dtype code 99"),
        (18, struct.pack("<Q", 2**60), "was it cut short"),
        (34, struct.pack("<i", -2), "sequence 0 has a negative length"),
        (34 + 12 + 8, struct.pack("<q", 5), "sequence 1 is at byte 5, but the lengths before it end at 4"),
        (34 + 36, struct.pack("<q", 1), "boundaries do not rise from 0 to the 3"),
        (34 + 36 + 8, struct.pack("<q", 4), "boundaries do not rise"),
        (34 + 36 + 8, struct.pack("<q", -(2**63)), "boundaries do not rise"),
        (34 + 36 + 16, struct.pack("<q", 2), "boundaries do not rise"),
    ],
)
def test_damage_is_named(tmp_path, at, what, sentence):
    tokens, index = files_by_hand([[[1, 2]], [[3], [4]]], "H")
    with pytest.raises(UserError, match=sentence) as caught:
        IndexedDataset(put(tmp_path / "x", tokens, index[:at] + what + index[at + len(what) :]))
    assert str(tmp_path / "x.idx") in str(caught.value)


def test_multimodal_and_missing_files_are_named(tmp_path):
    tokens, index = files_by_hand([[[1, 2]], [[3]]], "H")
    with pytest.raises(UserError, match="multimodal"):
        IndexedDataset(put(tmp_path / "x", tokens, index + b"\0\0"))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match=r"no file .*x\.bin"):
        IndexedDataset(tmp_path / "x")
    with pytest.raises(UserError, match=r"no file .*y\.idx"):
        IndexedDataset(tmp_path / "y")


def test_an_array_outlives_its_dataset(tmp_path):
    first = IndexedDataset(put(tmp_path / "x", *files_by_hand([[[1, 2]], [[3]]], "H")))[0]
    assert first.tolist() == [1, 2]


@pytest.mark.parametrize("token", [-1, 65536])
def test_id_out_of_range_is_refused_and_leaves_nothing(tmp_path, token):
    with pytest.raises(UserError, match=f"token id {token} does not fit"):
        write(tmp_path / "x", [1, 2], [1, token])
    assert list(tmp_path.iterdir()) == []


def test_counts_that_disagree_are_our_mistake(tmp_path):
    with IndexedWriter(tmp_path / "x", "<u2") as writer:
        for lengths, sequences in [([1], [1]), ([2], [2])]:
            with pytest.raises(ValueError, match="2 tokens for lengths with sum"):
                writer.add(np.array([1, 2]), lengths, sequences)


def test_what_stood_there_stays_until_the_new_dataset_is_complete(tmp_path):
    old = put(tmp_path / "x", *files_by_hand([[[1, 2, 3]]], "H"))
    (tmp_path / "x.json").write_bytes(record().to_json())
    with IndexedWriter(old, "<u2") as writer:
        writer.add(np.array([9, 9]), [2], [1])
        assert IndexedDataset(old)[0].tolist() == [1, 2, 3]  # and leaving without finish() keeps it
    assert IndexedDataset(old)[0].tolist() == [1, 2, 3]

    write(old, [9, 9])
    assert IndexedDataset(old)[0].tolist() == [9, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]  # the old record is gone


def test_files_are_synced_and_the_index_is_published_last(tmp_path, monkeypatch):
    events = []
    index = tmp_path / "x.idx"
    index.write_text("of the dataset that stood here")

    def replace(self: Path, target: Path) -> None:
        assert not index.exists()  # it would make a dataset of the new tokens
        events.append(target.name)

    monkeypatch.setattr("os.fsync", lambda handle: events.append("fsync"))
    monkeypatch.setattr(Path, "replace", replace)
    with IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer.add(np.array([1, 2, 3]), [3], [1])
        writer.finish(record())
    assert events == ["fsync", "fsync", "fsync", "x.bin", "x.json", "x.idx"]


@pytest.mark.parametrize("failing", [".bin", ".idx"])
def test_failed_rename_leaves_no_part_under_a_final_name(tmp_path, monkeypatch, failing):
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if str(target).endswith(failing):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x", [1])
    assert list(tmp_path.iterdir()) == []


def test_failed_rename_takes_back_the_tokens_that_were_kept(tmp_path, monkeypatch):
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if str(target).endswith("x.idx"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with IndexedWriter(tmp_path / "x", "<u2", tokens=tmp_path / "kept") as writer:
        writer.add(np.array([1, 2, 3]), [3], [1])
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("kept", 6)]


def test_over_4_gib_and_2_31_tokens_are_read_right(tmp_path):
    """A sparse .bin: 2 sequences of almost 2^31 tokens, and a short one behind them at 8 GiB."""
    lengths = [2**31 - 1, 2**31 - 1, 3]
    starts = np.cumsum([0, *lengths])
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", *lengths)
    index += struct.pack("<3q", *(2 * starts[:3])) + struct.pack("<4q", 0, 1, 2, 3)
    put(tmp_path / "x", b"", index)
    with Path(tmp_path / "x.bin").open("wb") as file:
        file.truncate(2 * int(starts[3]))
        file.seek(2 * int(starts[2]))
        file.write(struct.pack("<3H", 5, 6, 7))
    for mmap in (True, False):
        dataset = IndexedDataset(tmp_path / "x", mmap=mmap)
        assert dataset.num_tokens == 2**32 + 1
        assert dataset[2].tolist() == dataset.document(2).tolist() == [5, 6, 7]


def test_sequence_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megadyn.data.indexed_writer.LONGEST_SEQUENCE", 2)
    with pytest.raises(UserError, match="a document of 3 tokens"):
        write(tmp_path / "x", [1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_dtype_for_vocabulary():
    assert [dtype_for(size) for size in (257, 65499)] == [np.dtype("<u2")] * 2
    assert [dtype_for(size) for size in (65500, 65536, 150_000)] == [np.dtype("<i4")] * 3


def test_record_must_belong_to_the_dataset(tmp_path):
    prefix = put(tmp_path / "x", *files_by_hand([[[1, 2, 3]]], "H"))
    path = tmp_path / "x.json"
    path.write_bytes(record().to_json())
    assert IndexedDataset(prefix).record == record()
    for content, sentence in [
        (record(tokens=4).to_json(), "belongs to another dataset"),
        (b"{", "not the record of a dataset"),
        (b"[1]", "not the record"),
        (b'{"tokens": 3}', "not the record"),
        *(
            (record(**{name: wrong}).to_json(), rf"not the record of a dataset \({name} is ")
            for name, wrong in (
                ("fingerprint", None),
                ("vocab_size", "x"),
                ("text_bytes", []),
                ("skipped", None),
                ("source", {}),
                ("source", [1]),
            )
        ),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.json: .*{sentence}"):
            IndexedDataset(prefix)


def test_check_tokenizer(tmp_path, tokenizer_folder):
    prefix = put(tmp_path / "x", *files_by_hand([[[1, 2, 3]]], "H"))
    byte, bpe = load_tokenizer("byte"), load_tokenizer(tokenizer_folder)
    check_tokenizer(IndexedDataset(prefix), bpe)  # made by Megatron-LM: nothing is known, all fits
    bpe.vocab_size = 65536
    check_tokenizer(IndexedDataset(prefix), bpe)
    bpe.vocab_size = 65537
    with pytest.raises(UserError, match="has 65537 ids, more than the uint16"):
        check_tokenizer(IndexedDataset(prefix), bpe)

    (tmp_path / "x.json").write_bytes(record().to_json())
    check_tokenizer(IndexedDataset(prefix), byte)
    with pytest.raises(UserError, match=r"was made with tokenizer byte .* not with tokenizer"):
        check_tokenizer(IndexedDataset(prefix), load_tokenizer(tokenizer_folder))


def test_verify(tmp_path, monkeypatch):
    monkeypatch.setattr("megadyn.data.inspection.CHUNK_TOKENS", 2)
    documents = [[[3, 1, 2]], [[9, 4]]]
    dataset = IndexedDataset(put(tmp_path / "x", *files_by_hand(documents, "H")))
    found = verify(dataset, 10)
    assert (found.smallest_id, found.largest_id) == (1, 9)
    with pytest.raises(UserError, match="token id 9 is not below the vocabulary of 9"):
        verify(dataset, 9)

    whole = record(documents=2, sequences=2, tokens=5, sha256=found.sha256)
    (tmp_path / "x.json").write_bytes(whole.to_json())
    assert verify(IndexedDataset(tmp_path / "x"), 10) == found
    put(tmp_path / "x", *files_by_hand([[[3, 1, 2]], [[9, 5]]], "H"))
    with pytest.raises(UserError, match="its tokens changed since they were written"):
        verify(IndexedDataset(tmp_path / "x"), 10)

    put(tmp_path / "y", *files_by_hand([[[-3]]], "i"))
    with pytest.raises(UserError, match="token id -3 is negative"):
        verify(IndexedDataset(tmp_path / "y"), None)


def test_length_histogram():
    sizes = np.array([0, 0, 1, 2, 3, 4, 7, 8, 1024, 2**31 - 1], np.int32)
    assert length_histogram(sizes) == {
        "0": 2,
        "1": 1,
        "2-3": 2,
        "4-7": 2,
        "8-15": 1,
        "1024-2047": 1,
        "1073741824-2147483647": 1,
    }
    assert length_histogram(sizes[:0]) == {}
