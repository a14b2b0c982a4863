import itertools
import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.merge import merge_datasets
from megadyn.data.preprocess import batches_of, encode, preprocess
from megadyn.data.readers import Corpus
from megadyn.data.tokenizer import load_tokenizer
from megadyn.errors import UserError
from tests.data.corpora import random_texts

KINDS = ("bin", "idx", "json")
byte = partial(load_tokenizer, "byte")


def corpus_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(prefix: Path, kinds: tuple[str, ...] = KINDS) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in kinds]


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
    assert len(dataset) == sum(1 for ids in want if ids)        # an empty text is a document without a sequence
    assert dataset.record == record
    assert (record.documents, record.tokens) == (len(texts), sum(map(len, want)))
    assert (record.fingerprint, record.vocab_size, record.eod) == (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod)
    assert record.source == [str(tmp_path / "a.jsonl")]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("megadyn.data.preprocess.batches_of", partial(batches_of, characters=200))      # some 40 batches
    corpus = Corpus([corpus_file(tmp_path / "a.jsonl", random_texts(100))])
    for workers in (1, 3):
        preprocess(corpus, tokenizer_folder, tmp_path / f"w{workers}", append_eod=True, workers=workers)
    assert contents(tmp_path / "w1") == contents(tmp_path / "w3")


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

    merge_datasets([tmp_path / "part0", tmp_path / "part0"], tmp_path / "part0", overwrite=True)      # onto its own input
    assert IndexedDataset(tmp_path / "part0").num_documents == 2 * 22


def test_merge_refuses_what_does_not_belong_together(tmp_path, tokenizer_folder, write_dataset):
    corpus = Corpus([corpus_file(tmp_path / "a.jsonl", ["some text"])])
    preprocess(corpus, "byte", tmp_path / "bytes")
    preprocess(corpus, "byte", tmp_path / "ended", append_eod=True)
    preprocess(corpus, tokenizer_folder, tmp_path / "bpe")
    write_dataset([[3]], name="foreign", dtype="<u2")
    write_dataset([[3]], name="wide", dtype="<i4")
    for other, sentence in [("ended", "differ in --append-eod"), ("bpe", "different tokenizers"),
                            ("foreign", "nothing says which tokenizer made dataset .*foreign"), ("wide", "uint16 and int32"),
                            ("missing", "no file")]:
        with pytest.raises(UserError, match=sentence):
            merge_datasets([tmp_path / "bytes", tmp_path / other], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    merged = merge_datasets([tmp_path / "foreign", tmp_path / "foreign"], tmp_path / "out")
    assert merged.record is None
    assert merged.tokens.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_line_ends_the_job_and_leaves_nothing(tmp_path, workers):
    path = corpus_file(tmp_path / "a.jsonl", random_texts(50))
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl:51: no JSON"):
        preprocess(Corpus([path]), "byte", tmp_path / "out" / "x", workers=workers)
    assert list((tmp_path / "out").iterdir()) == []

    record = preprocess(Corpus([path], on_error="skip"), "byte", tmp_path / "out" / "x", workers=workers)
    assert (record.documents, record.skipped) == (50, 1)


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


def test_batches_keep_order_and_are_bounded():
    texts = ["a" * n for n in (5, 0, 3, 20, 1, 1)]
    batches = list(batches_of(texts, characters=8))
    assert [text for batch in batches for text in batch] == texts
    assert [sum(map(len, batch)) for batch in batches] == [8, 20, 2]


def test_workers_read_a_bounded_number_of_batches_ahead():
    taken = itertools.count()
    source = ([f"batch {next(taken)}"] for _ in itertools.count())       # endless
    results = encode(source, byte, None, workers=2)
    for i in range(10):
        assert bytes(next(results).tokens.tolist()) == b"batch %d" % i
    results.close()
    assert next(taken) <= 14


def test_what_a_worker_raises_ends_the_job():
    batches = [["fine"], ["\ud800"], *[["never reached"]] * 5]      # a lone surrogate cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        list(encode(batches, byte, None, workers=2))


def test_worker_that_dies_ends_the_job():
    results = encode((["text"] for _ in itertools.count()), byte, None, workers=2)
    next(results)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a tokenizer process died"):
        list(results)


def test_eod_beyond_uint8_is_kept():
    (encoded,) = encode([["a", "", "b"]], byte, 256, workers=1)
    assert encoded.tokens.tolist() == [97, 256, 98, 256]
    assert encoded.lengths.tolist() == [2, 0, 2]
    assert encoded.lengths.dtype == np.int64
