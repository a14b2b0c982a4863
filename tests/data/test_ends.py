"""Whatever uses the end of a document takes the token that was written when the dataset was made."""

import dataclasses
import json
from pathlib import Path

import pytest

from megadyn.data.ends import adopt_eod, check_eod, check_marked
from megadyn.data.indexed import IndexedDataset
from megadyn.data.record import read_record
from megadyn.errors import UserError
from megadyn.prepare.merge import merge_datasets
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.tokenization.tokenizer import load_tokenizer
from tests.helpers.corpora import corpus_file
from tests.tokenization.test_tokenizer import rewritten


@pytest.fixture
def made(tmp_path):
    """made("x", ...): a dataset of three documents by the byte tokenizer."""

    def make(name: str, **options) -> IndexedDataset:
        preprocess(
            Corpus([corpus_file(tmp_path / "c.jsonl", ["one", "", "two"])]),
            "byte",
            tmp_path / name,
            **options,
        )
        return IndexedDataset(tmp_path / name)

    return make


def without_record(dataset: IndexedDataset) -> IndexedDataset:
    Path(f"{dataset.prefix}.json").unlink()
    return IndexedDataset(dataset.prefix)


def test_a_chosen_token_is_written_and_recorded(made, logged):
    dataset = made("x", append_eod=True, eod="!")
    assert [dataset.document(k).tolist() for k in range(3)] == [[*b"one!"], [], [*b"two!"]]
    assert dataset.record.eod == ord("!")
    assert "end of document: '!' (id 33; --eod)" in logged.messages
    made("y", append_eod=True)
    assert "end of document: '<|endoftext|>' (id 256; part of the tokenizer)" in logged.messages


def test_twins_are_not_merged(tokenizer_folder, tmp_path):
    """The same tokenizer.json, with an eos_token of its own in each folder."""
    chat = rewritten(tokenizer_folder, tmp_path / "chat", "tokenizer_config.json", eos_token="!")
    corpus = corpus_file(tmp_path / "c.jsonl", ["one", "two"])
    for name, folder, options in [
        ("base", tokenizer_folder, {}),
        ("twin", chat, {}),
        ("again", chat, {"eod": "<|endoftext|>"}),
    ]:
        preprocess(Corpus([corpus]), folder, tmp_path / f"{name}-data", append_eod=True, **options)
    base, twin, again = (IndexedDataset(tmp_path / f"{name}-data") for name in ("base", "twin", "again"))
    assert base.record.fingerprint == twin.record.fingerprint
    with pytest.raises(
        UserError, match=r"end their documents with different tokens \(ids 0 and \d+\); preprocess one"
    ):
        merge_datasets([base.prefix, twin.prefix], tmp_path / "all")
    assert merge_datasets([base.prefix, again.prefix], tmp_path / "all").record.eod == 0


def test_the_written_token_is_adopted_and_others_are_held_to_it(made, logged):
    tokenizer = load_tokenizer("byte")
    bang, usual, none = made("bang", append_eod=True, eod="!"), made("usual", append_eod=True), made("none")
    adopt_eod(tokenizer, none)
    assert tokenizer.eod == 256
    adopt_eod(tokenizer, bang)
    assert tokenizer.eod == 33
    assert "instead of tokenizer byte's own" in logged.messages[-1]
    check_eod(bang, 33)
    check_eod(none, 33)
    with pytest.raises(UserError, match="ends its documents with token id 256, but 33 should"):
        check_eod(usual, 33)


def test_masks_need_documents_that_end_with_the_token(made):
    check_marked(made("a", append_eod=True), 256)
    check_marked(without_record(made("b", append_eod=True)), 256)
    with pytest.raises(UserError, match="was made without --append-eod"):
        check_marked(made("c"), 256)
    with pytest.raises(UserError, match="document 0 of dataset .* ends with token id 101, not with 256"):
        check_marked(without_record(made("d")), 256)
    with pytest.raises(UserError, match="ends its documents with token id 33, but 256 should"):
        check_marked(made("e", append_eod=True, eod="!"), 256)


def test_old_records_are_read(made):
    record = made("x", append_eod=True).record
    path = Path(f"{made('y', append_eod=True).prefix}.json")
    content = dataclasses.asdict(record)
    del content["eod"], content["text_bytes"]
    path.write_text(json.dumps(content))
    assert read_record(path).eod is None
    check_marked(IndexedDataset(path.with_suffix("")), 256)  # by its documents
