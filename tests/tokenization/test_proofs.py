"""The proof of gigatoken is kept by tokenizer; what depends on the corpus is proved at each start."""

import pytest

from megadyn.errors import UserError
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.tokenization import gigatoken
from megadyn.tokenization.gigatoken import GigatokenTokenizer, itself, with_engine
from megadyn.tokenization.proofs import KeptProof, folder
from megadyn.tokenization.tokenizer import load_tokenizer
from tests.helpers.corpora import corpus_file
from tests.tokenization.test_tokenizer import with_added


def test_the_probes_are_encoded_once(tokenizer_folder, monkeypatch, logged):
    reference = load_tokenizer(tokenizer_folder)
    first, _ = with_engine(reference, "auto", lambda: ["a"])
    assert len(list(folder().iterdir())) == 1
    monkeypatch.setattr(gigatoken, "probe_texts", lambda _: pytest.fail("proved again"))
    second, _ = with_engine(reference, "auto", lambda: ["a"])
    assert isinstance(second, GigatokenTokenizer) and second.in_pieces == first.in_pieces
    assert logged.messages[-1].endswith("awkward texts, and on all others in an earlier run")
    KeptProof(reference).path.write_text("{")
    with pytest.raises(BaseException, match="proved again"):
        with_engine(reference, "auto", lambda: ["a"])


def test_another_tokenizer_or_library_is_proved_anew(tokenizer_folder, tmp_path, monkeypatch):
    paths = {KeptProof(load_tokenizer(tokenizer_folder)).path}
    paths.add(KeptProof(load_tokenizer(with_added(tokenizer_folder, tmp_path / "x", ("<eos>", True)))).path)
    monkeypatch.setattr("megadyn.tokenization.proofs.library_version", lambda name: "next")
    paths.add(KeptProof(load_tokenizer(tokenizer_folder)).path)
    assert len(paths) == 3


def test_a_kept_proof_does_not_cover_the_corpus(tokenizer_folder, monkeypatch):
    reference = load_tokenizer(tokenizer_folder)
    with_engine(reference, "auto", lambda: ["a"])
    encode = GigatokenTokenizer.encode_batch
    monkeypatch.setattr(
        GigatokenTokenizer,
        "encode_batch",
        lambda self, texts: [
            ids[::-1] if "surprise" in text else ids
            for text, ids in zip(texts, encode(self, texts), strict=True)
        ],
    )
    assert with_engine(reference, "auto", lambda: ["a surprise"])[1] is itself


def test_no_end_of_document_token_is_told_before_the_proof(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "megadyn.prepare.preprocess.with_engine", lambda *_: pytest.fail("the engine came first")
    )
    corpus = Corpus([corpus_file(tmp_path / "c.jsonl", ["a"])])
    with pytest.raises(UserError, match="no end-of-document token"):
        preprocess(corpus, with_added(tokenizer_folder, tmp_path / "none"), tmp_path / "out", append_eod=True)
