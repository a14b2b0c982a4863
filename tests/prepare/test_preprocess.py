import errno
import json
import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.errors import UserError
from megadyn.prepare.merge import merge_datasets
from megadyn.prepare.parts import Parts
from megadyn.prepare.preprocess import Encoder, batches_of, preprocess
from megadyn.prepare.progress import Progress
from megadyn.prepare.readers import Corpus
from megadyn.tokenization.tokenizer import load_tokenizer
from tests.helpers.corpora import contents, corpus_file, random_texts

byte = partial(load_tokenizer, "byte")


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("which", ["byte", "bpe", "sentencepiece"])
def test_each_text_becomes_a_document(tmp_path, which, append_eod, tokenizer_folder, sentencepiece_model):
    path = {"byte": "byte", "bpe": tokenizer_folder, "sentencepiece": sentencepiece_model}[which]
    texts = ["", *random_texts(30), ""]
    corpus = Corpus([corpus_file(tmp_path / "a.jsonl", texts)])
    record = preprocess(corpus, path, tmp_path / "x", append_eod=append_eod)
    dataset, tokenizer = IndexedDataset(tmp_path / "x"), load_tokenizer(path)
    want = [tokenizer.encode_batch([text])[0].tolist() for text in texts]
    want = [[*ids, tokenizer.eod] if append_eod and ids else ids for ids in want]

    assert [dataset.document(k).tolist() for k in range(dataset.num_documents)] == want
    assert len(dataset) == sum(1 for ids in want if ids)  # an empty text is a document without a sequence
    assert dataset.record == record
    assert (record.documents, record.tokens) == (len(texts), sum(map(len, want)))
    assert (record.fingerprint, record.vocab_size, record.eod) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eod,
    )
    assert record.source == [str(tmp_path / "a.jsonl")]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer_folder, small_units, monkeypatch):
    corpus = Corpus([corpus_file(tmp_path / "a.jsonl", random_texts(100))])
    assert len(corpus.units()) > 20
    for workers in (1, 3):
        preprocess(corpus, tokenizer_folder, tmp_path / f"w{workers}", append_eod=True, workers=workers)
    monkeypatch.undo()
    assert len(corpus.units()) == 1
    preprocess(corpus, tokenizer_folder, tmp_path / "one unit", append_eod=True)
    assert contents(tmp_path / "w1") == contents(tmp_path / "w3") == contents(tmp_path / "one unit")


def test_merge_equals_preprocessing_all_at_once(tmp_path, tokenizer_folder):
    inputs = [corpus_file(tmp_path / f"{i}.jsonl", ["", *random_texts(20, seed=i), ""]) for i in range(3)]
    inputs[1].write_text(inputs[1].read_text() + "broken\n")
    make = partial(preprocess, tokenizer_path=tokenizer_folder, append_eod=True)
    for i, path in enumerate(inputs):
        make(Corpus([path], on_error="skip"), prefix=tmp_path / f"part{i}")
    make(Corpus(inputs, on_error="skip"), prefix=tmp_path / "whole")
    merge_datasets([tmp_path / f"part{i}" for i in range(3)], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert IndexedDataset(tmp_path / "merged").record.skipped == 1

    # onto its own input
    merge_datasets([tmp_path / "part0", tmp_path / "part0"], tmp_path / "part0", overwrite=True)
    assert IndexedDataset(tmp_path / "part0").num_documents == 2 * 22


def test_merge_refuses_what_does_not_belong_together(tmp_path, tokenizer_folder, write_dataset):
    corpus = Corpus([corpus_file(tmp_path / "a.jsonl", ["some text"])])
    preprocess(corpus, "byte", tmp_path / "bytes")
    preprocess(corpus, "byte", tmp_path / "ended", append_eod=True)
    preprocess(corpus, tokenizer_folder, tmp_path / "bpe")
    write_dataset([[3]], name="foreign", dtype="<u2")
    write_dataset([[3]], name="wide", dtype="<i4")
    for other, sentence in [
        ("ended", "differ in --append-eod"),
        ("bpe", "different tokenizers"),
        ("foreign", "there is no record of which tokenizer made dataset .*foreign"),
        ("wide", "uint16 and int32"),
        ("missing", "no file"),
    ]:
        with pytest.raises(UserError, match=sentence):
            merge_datasets([tmp_path / "bytes", tmp_path / other], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    merged = merge_datasets([tmp_path / "foreign", tmp_path / "foreign"], tmp_path / "out")
    assert merged.record is None
    assert merged.tokens.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_line_ends_the_job_and_leaves_no_dataset(tmp_path, workers, small_units):
    path = corpus_file(tmp_path / "a.jsonl", random_texts(50))
    path.write_text(path.read_text() + "broken\n" + json.dumps({"text": "a"}) + "\nbroken again\n")
    with pytest.raises(UserError, match=r"a\.jsonl:51: invalid JSON"):
        preprocess(Corpus([path]), "byte", tmp_path / "out" / "x", workers=workers)
    assert [left.name for left in (tmp_path / "out").iterdir()] == ["x.parts"]  # what was finished before

    corpus = Corpus([path], on_error="skip")
    record = preprocess(corpus, "byte", tmp_path / "out" / "x", workers=workers)
    assert (record.documents, record.skipped) == (51, 2)
    assert f"{path}:51: " in str(corpus.first_skipped)


def test_a_part_with_documents_left_out_is_none_where_none_may_be(tmp_path):
    (tmp_path / "a.jsonl").write_text('broken\n{"text": "a"}\n')
    parts = Parts(tmp_path / "x")
    with parts.locked():
        for on_error in ("skip", "fail"):
            corpus = Corpus([tmp_path / "a.jsonl"], on_error=on_error)
            encoder = Encoder(corpus, corpus.units(), byte(), parts, eod=None, limit=None)
            encoder.names, _ = encoder.known(in_order=False)
            if on_error == "skip":
                assert encoder.part(0) == encoder.part(0)
            else:
                with pytest.raises(UserError, match="invalid JSON"):
                    encoder.part(0)


def test_no_room_for_the_dataset_ends_the_workers_and_keeps_their_parts(tmp_path, small_units, monkeypatch):
    """The parts are joined while others are still encoded."""
    path = corpus_file(tmp_path / "a.jsonl", random_texts(200))
    joined = []

    def no_room(writer: IndexedWriter, part: Path, *_: object) -> None:
        joined.append(part)
        if len(joined) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "add_file", no_room)
    with pytest.raises(UserError, match=f"{tmp_path / 'x'}: No space left on device"):
        preprocess(Corpus([path]), "byte", tmp_path / "x", workers=2)
    assert not multiprocessing.active_children()
    assert [file.name for file in tmp_path.iterdir() if file != path] == ["x.parts"]
    assert {file.stem for file in joined} <= {file.stem for file in (tmp_path / "x.parts").glob("*.json")}


def test_bad_line_in_a_small_corpus_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("broken\n")
    with pytest.raises(UserError, match="invalid JSON"):
        preprocess(Corpus([tmp_path / "a.jsonl"]), "byte", tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"corpus is empty: no tokens in . documents of .*a\.jsonl"):
        preprocess(Corpus([tmp_path / "a.jsonl"]), "byte", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_existing_output_is_kept_unless_told_otherwise(tmp_path):
    corpus = Corpus([corpus_file(tmp_path / "a.jsonl", ["new"])])
    (tmp_path / "x.bin").write_text("precious")
    with pytest.raises(UserError, match=r"x\.bin exists already; give --overwrite"):
        preprocess(corpus, "byte", tmp_path / "x")
    assert (tmp_path / "x.bin").read_text() == "precious"
    preprocess(corpus, "byte", tmp_path / "x", overwrite=True)
    assert bytes(IndexedDataset(tmp_path / "x").tokens.tolist()) == b"new"


def test_output_inside_the_input_folder_is_no_input(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert preprocess(Corpus([tmp_path]), "byte", tmp_path / "x").documents == 1


def test_batches_keep_order_and_are_bounded(monkeypatch):
    monkeypatch.setattr("megadyn.prepare.preprocess.BATCH_BYTES", 8)
    texts = ["é" * 2, "a", "", "aaa", "a" * 20, "a", "a"]
    raw = [text.encode() for text in texts]
    assert list(batches_of(iter(raw))) == [(raw[:4], 8), (raw[4:5], 20), (raw[5:], 2)]


def test_max_documents_takes_the_first_and_forgets_what_comes_after(tmp_path, small_units, monkeypatch):
    monkeypatch.setattr("megadyn.prepare.preprocess.BATCH_BYTES", 50)
    texts = ["", *random_texts(60), "last"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text(
        "\n".join([*lines[:10], "broken", *lines[10:40], "broken", "broken", *lines[40:]])
    )
    corpus = partial(Corpus, [tmp_path / "a.jsonl"], on_error="skip")
    for count in (2, 10, 11, 40, 41, len(texts), 1000):
        records = [
            preprocess(
                corpus(),
                "byte",
                tmp_path / f"{count}-{workers}",
                append_eod=True,
                workers=workers,
                max_documents=count,
            )
            for workers in (1, 3)
        ]
        assert contents(tmp_path / f"{count}-1") == contents(tmp_path / f"{count}-3")
        dataset = IndexedDataset(tmp_path / f"{count}-1")
        want = [[*text.encode(), 256] if text else [] for text in texts[:count]]
        assert [dataset.document(k).tolist() for k in range(dataset.num_documents)] == want
        assert records[0].text_bytes == sum(len(text.encode()) for text in texts[:count])
    fails = Corpus([tmp_path / "a.jsonl"])
    # the first bad line comes later
    preprocess(fails, "byte", tmp_path / "before", max_documents=10, workers=2)
    with pytest.raises(UserError, match="jsonl:11: invalid JSON"):
        preprocess(fails, "byte", tmp_path / "behind", max_documents=11, workers=2)


def test_what_is_encoded_once_more_is_not_reported_again(tmp_path, small_units, monkeypatch):
    """Nor may it be: the lock on the counts may be held for ever by a worker that was no longer needed, and so killed."""
    path = corpus_file(tmp_path / "a.jsonl", ["x" * 237] * 4)  # units of two lines of 250 bytes
    reported: list[int] = []
    monkeypatch.setattr(Progress, "add", lambda self, bytes_on_disk, tokens: reported.append(bytes_on_disk))
    assert preprocess(Corpus([path]), "byte", tmp_path / "x", max_documents=3).documents == 3
    assert sum(reported) == path.stat().st_size


def test_shuffled_documents_are_the_same_ones_in_a_seeded_order(tmp_path, small_units, monkeypatch):
    monkeypatch.setattr("megadyn.prepare.shuffle.CHUNK_TOKENS", 100)
    texts = ["", *random_texts(60), ""]
    path = corpus_file(tmp_path / "a.jsonl", texts)
    for seed, workers in ((0, 1), (0, 3), (1, 1)):
        preprocess(Corpus([path]), "byte", tmp_path / f"{seed}-{workers}", workers=workers, shuffle_seed=seed)
    assert contents(tmp_path / "0-1") == contents(tmp_path / "0-3")
    for seed in (0, 1):
        dataset = IndexedDataset(tmp_path / f"{seed}-1")
        order = np.random.default_rng(seed).permutation(len(texts))
        assert [bytes(dataset.document(k).tolist()).decode() for k in range(len(texts))] == [
            texts[i] for i in order
        ]


@pytest.mark.parametrize("wide", [False, True])
def test_eod_is_kept_whatever_the_type_of_the_ids(wide):
    tokenizer = byte()
    if wide:
        tokenizer.vocab_size = 70_000
    encoder = Encoder(Corpus([]), [], tokenizer, Parts(Path("x")), eod=256, limit=None)
    tokens, lengths = encoder._encode([b"a", b"", b"b"])
    assert tokens.tolist() == [97, 256, 98, 256]
    assert lengths.tolist() == [2, 0, 2]
    assert tokens.dtype == ("<i4" if wide else "<u2")


def test_id_beyond_the_vocabulary_is_refused():
    tokenizer = byte()
    tokenizer.vocab_size = 98
    with pytest.raises(UserError, match="token id 98 is not below its vocabulary size 98"):
        Encoder(Corpus([]), [], tokenizer, Parts(Path("x")), eod=None, limit=None)._encode([b"ab"])
