"""From a configuration to sets of samples: blends, splits, separate sets, the length of a run; and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from megadyn.config import Config, DataConfig, TokenizerConfig, batch_plan
from megadyn.data.blend import Blend
from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.samples import SampleSet, split_documents
from megadyn.data.text_bytes import in_bits_per_byte, mean_bytes_per_token
from megadyn.errors import ConfigError, UserError
from megadyn.model.documents import documents_of
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.training.data import Data, evaluation_size, open_data
from tests.helpers.servers import COMMIT, lay_out
from tests.helpers.tiny import tiny_config

LENGTH = 24


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, int], str]:
    """make("a", 40): prefix of a dataset of 40 documents of 50 tokens, all of them the letter a."""

    def make(letter: str, documents: int) -> str:
        with IndexedWriter(tmp_path / letter, "<u2") as writer:
            writer.add(np.full(50 * documents, ord(letter)), [50] * documents, [1] * documents)
            writer.finish()
        return str(tmp_path / letter)

    return make


def configured(training: dict[str, Any] | None = None, **data: Any) -> Config:
    config = tiny_config("dense", vocab_size=300)
    config.data, config.tokenizer = DataConfig(**data), TokenizerConfig(path="byte")
    for key, value in ({"iterations": 10} | (training or {})).items():
        setattr(config.training, key, value)
    return config.checked()


def opened(training: dict[str, Any] | None = None, **data: Any) -> Data:
    return open_data(configured(training, **data))


def letters(samples: Any, count: int) -> str:
    """What each of the first samples consists of."""
    rows = samples.take(range(count))
    assert (rows == rows[:, :1]).all()
    return bytes(rows[:, 0].astype(np.uint8)).decode()


def test_validation_sets_with_names_are_opened_each(make, tmp_path):
    shares = [{"prefix": make("b", 9), "weight": 1}, {"prefix": make("c", 9), "weight": 1}]
    data = opened(train=make("a", 9), validation={"b": make("b", 9), "both": shares})
    assert data.validation is None and list(data.validations) == ["validation/b", "validation/both"]
    assert letters(data.validations["validation/b"], 3) == "bbb"
    assert sorted(letters(data.validations["validation/both"], 4)) == ["b", "b", "c", "c"]
    assert list(opened(train=make("a", 9), validation=make("b", 9)).validations) == ["validation"]
    assert mean_bytes_per_token(data.validations["validation/b"]) is None  # made without a text


def test_bytes_per_token_are_those_of_the_shares(tmp_path):
    for name, size in (("one", 10), ("two", 30)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "x" * size}) + "\n")
        preprocess(Corpus([tmp_path / f"{name}.jsonl"]), "byte", tmp_path / name, append_eod=True)
    one, two = (
        SampleSet(IndexedDataset(tmp_path / name), sequence_length=8, seed=0, shuffle=False)
        for name in ("one", "two")
    )
    assert mean_bytes_per_token(one) == 10 / 11
    assert mean_bytes_per_token(Blend([one, two], [1, 3])) == pytest.approx(0.25 * 10 / 11 + 0.75 * 30 / 31)
    assert in_bits_per_byte({"causal": 2.0}, 10 / 11)["causal"] == pytest.approx(2.0 * 1.1 / math.log(2))


def test_one_dataset_is_cut_as_it_always_was(make):
    prefix = make("a", 100)
    data = opened(train=prefix)
    split = split_documents(IndexedDataset(prefix), 0.01, 0, seed=1234)
    assert isinstance(data.train, SampleSet)
    assert (
        data.train.key
        == SampleSet(IndexedDataset(prefix), sequence_length=LENGTH, seed=1234, documents=split.train).key
    )
    assert len(data.train) == (99 * 50 - 1) // LENGTH
    assert data.validation is not None and len(data.validation) == (50 - 1) // LENGTH
    assert data.test is None and data.eod is None


@pytest.mark.parametrize(("unit", "scale"), [("weight", 0.1), ("tokens", 10**9)])
def test_a_blend_holds_its_shares(make, unit, scale):
    prefixes = [make("a", 50), make("b", 60), make("c", 70)]
    entries = [
        {"prefix": prefix, unit: share * scale} for prefix, share in zip(prefixes, (5, 3, 2), strict=True)
    ]
    data = opened(train=entries)
    assert isinstance(data.train, Blend)
    for count in (10, 100, 500):
        seen = letters(data.train, count)
        assert [seen.count(letter) for letter in "abc"] == [count * share // 10 for share in (5, 3, 2)]
    assert data.validation is not None
    assert set(letters(data.validation, 4)) <= set("abc")  # held out of each


def test_without_shares_each_counts_as_it_is_large(make):
    data = opened(train=[make("a", 30), make("b", 90)], split=[1, 0, 0])
    size = len(data.train)
    seen = letters(data.train, size)
    assert size >= 4 * 62 - 2
    assert abs(seen.count("a") - size / 4) <= 1


def test_datasets_of_one_size_are_not_shuffled_alike(make):
    data = opened(train=[make("a", 50), make("b", 50)])
    orders = [samples._epoch(0).sequences.tolist() for samples in data.train.sets]
    assert sorted(orders[0]) != orders[0] != orders[1]


def test_split_and_separate_sets(make):
    train, other = make("a", 100), make("b", 20)
    data = opened(train=train, split=[0.5, 0.3, 0.2])
    assert [len(part) for part in data[:3]] == [
        (50 * 50 - 1) // LENGTH,
        (30 * 50 - 1) // LENGTH,
        (20 * 50 - 1) // LENGTH,
    ]

    data = opened(train=train, validation=other, test=[other, train])
    assert len(data.train) == (100 * 50 - 1) // LENGTH  # nothing is held out of it
    assert letters(data.validation, 3) == "bbb"
    assert letters(data.test, 12).count("a") == 10

    data = opened(train=train, validation=other, split=[0.8, 0, 0.2])
    assert (letters(data.validation, 2), letters(data.test, 2)) == ("bb", "aa")
    assert len(data.test) == (20 * 50 - 1) // LENGTH

    data = opened(train=train, split=[1, 0, 0])
    assert data.validation is data.test is None


def test_plain_reads_give_the_same_samples(make):
    prefixes = [make("a", 50), make("b", 60)]
    mapped, plain = opened(train=prefixes), opened(train=prefixes, mmap=False)
    assert mapped.train.key == plain.train.key
    assert np.array_equal(mapped.train.take(range(300)), plain.train.take(range(300)))
    assert isinstance(mapped.train.sets[0].dataset.tokens, np.ndarray)
    assert not isinstance(plain.train.sets[0].dataset.tokens, np.ndarray)


def test_epochs_give_the_iterations(make):
    prefix = make("a", 100)  # 208 samples, 4 a step
    config = configured({"iterations": None, "epochs": 1}, train=prefix, split=[1, 0, 0], repeat=False)
    open_data(config)
    assert (config.training.iterations, config.training.epochs) == (52, None)
    config = configured({"iterations": None, "epochs": 2.5}, train=prefix, split=[1, 0, 0])
    open_data(config)
    assert config.training.iterations == 130


def test_a_run_that_repeats_is_refused_where_it_may_not(make):
    prefix = make("a", 100)
    opened({"iterations": 52}, train=prefix, split=[1, 0, 0], repeat=False)
    opened({"iterations": 53}, train=prefix, split=[1, 0, 0])
    with pytest.raises(ConfigError) as caught:
        opened({"iterations": 53}, train=prefix, split=[1, 0, 0], repeat=False)
    assert str(caught.value) == (
        f"data.repeat = False: must be true, or training.iterations at most 52: dataset {prefix} has "
        "no new sample left after 208 of the run's 212"
    )


def test_the_dataset_of_a_blend_that_runs_out_first_is_named(make):
    large, small = make("a", 100), make("b", 20)
    train = [{"prefix": large, "weight": 3}, {"prefix": small, "weight": 1}]
    opened({"iterations": 41}, train=train, split=[1, 0, 0], repeat=False)
    with pytest.raises(
        ConfigError, match=rf"at most 41: dataset {small} has no new sample left after 166 of the run's 168$"
    ):
        opened({"iterations": 42}, train=train, split=[1, 0, 0], repeat=False)
    data = opened({"iterations": 42}, train=train, split=[1, 0, 0])
    assert letters(data.train, 168).count("b") == 42  # 41 and the first of its second epoch


def test_a_tokenizer_by_address_gets_its_commit(
    make: Callable[[str, int], str], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_out(
        tmp_path / "hub", {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}, "org/words"
    )
    config = configured(train=make("a", 20), split=[1, 0, 0])
    config.tokenizer.path, config.model.vocab_size = "org/words", None
    open_data(config)
    assert config.tokenizer.path == f"org/words@{COMMIT}"
    open_data(config)
    assert config.tokenizer.path == f"org/words@{COMMIT}"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"train": ["a", "nowhere"]}, r"dataset nowhere: no file nowhere\.idx"),
        ({"train": "a", "test": "nowhere"}, r"dataset nowhere: no file nowhere\.idx"),
        (
            {"train": ["a", "one"]},
            "dataset one has 1 document, too few for a split into 2; name separate sets",
        ),
        (
            {"train": ["a", "short"], "split": [1, 0, 0]},
            "dataset short: the 20 tokens of 2 documents are too few",
        ),
        ({"train": "a", "validation": "short"}, "dataset short: the 20 tokens of 2 documents are too few"),
        ({"train": ["a", "foreign"], "split": [1, 0, 0]}, "more than the uint8 of dataset foreign can hold"),
    ],
)
def test_bad_datasets_are_named(make, tmp_path, monkeypatch, data, sentence):
    make("a", 10)
    for name, dtype, lengths in [
        ("one", "<u2", [50]),
        ("short", "<u2", [10, 10]),
        ("foreign", "u1", [50, 50]),
    ]:
        with IndexedWriter(tmp_path / name, dtype) as writer:
            writer.add(np.zeros(sum(lengths), np.int64), lengths, [1] * len(lengths))
            writer.finish()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        opened(**data)


def test_an_evaluation_takes_whole_rounds(make):
    config = configured(train=make("a", 100), split=[0.9, 0.1, 0])
    data, plan = open_data(config), batch_plan(config, 2)
    assert data.validation is not None and len(data.validation) == 20
    assert [evaluation_size("validation", data.validation, wanted, plan) for wanted in (2, 3, 20, 64)] == [
        2,
        2,
        20,
        20,
    ]
    with pytest.raises(ConfigError, match=r"^training\.eval_samples = 1: must be at least 2"):
        evaluation_size("validation", data.validation, 1, plan)
    with pytest.raises(ConfigError, match="and the test set must have that many; it has 20"):
        evaluation_size("test", data.validation, 1, plan)


def test_positions_begin_anew_in_every_document_and_every_sample(tmp_path):
    """Tokens count up inside a document, so that each says where it must stand."""
    end = 256
    lengths = np.random.default_rng(0).integers(1, 60, 50)
    with IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer.add(np.concatenate([[*range(n - 1), end] for n in lengths]), lengths, [1] * 50)
        writer.finish()
    data = opened(train=str(tmp_path / "x"), split=[1, 0, 0], document_mask=True)
    assert data.eod == end
    for sample in data.train:
        tokens = sample[:-1]
        found = documents_of(torch.from_numpy(tokens)[None], end)
        document, position = 0, 0
        for t, token in enumerate(tokens.tolist()):
            assert (int(found.segments.ids[0, t]), int(found.positions[0, t])) == (document, position)
            if token != end:
                assert position == token - (tokens[0] if document == 0 else 0)
            document, position = (document + 1, 0) if token == end else (document, position + 1)


def made_of_bytes(prefix: Path, **options: Any) -> str:
    corpus = prefix.with_name(f"{prefix.name}.jsonl")
    corpus.write_text('{"text": "some text of a few letters"}\n' * 20)
    preprocess(Corpus([corpus]), "byte", prefix, append_eod=True, **options)
    return str(prefix)


def test_documents_end_with_the_token_that_was_written(tmp_path):
    usual, bang = made_of_bytes(tmp_path / "usual"), made_of_bytes(tmp_path / "bang", eod="!")
    config = configured(train=bang, document_mask=True)
    assert open_data(config).eod == ord("!")
    assert config.tokenizer.eod == "!"  # so that the run's checkpoints know it
    assert opened(train=usual, document_mask=True).eod == 256
    for data in ({"train": [usual, bang]}, {"train": bang, "validation": usual}):
        with pytest.raises(UserError, match="ends its documents with token id"):
            opened(**data)
    config = configured(train=bang)
    config.tokenizer.eod = "<|endoftext|>"
    with pytest.raises(UserError, match="ends its documents with token id 33, but 256 should"):
        open_data(config)
    config.tokenizer.eod = "<nope>"
    with pytest.raises(UserError, match=r"no token '<nope>' in its vocabulary \(tokenizer\.eod\)"):
        open_data(config)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_ids_without_a_row_are_refused_in_every_set(make, tmp_path, name, mmap):
    with IndexedWriter(tmp_path / "foreign", "<i4") as writer:
        writer.add(np.array([1] * 99 + [300]), [100], [1])
        writer.finish()
    sets = {"train": make("a", 10)} | {name: str(tmp_path / "foreign")}
    with pytest.raises(
        UserError, match=r"foreign: its largest token id is 300, but the model's vocabulary has 300 ids"
    ):
        opened(**sets, split=[1, 0, 0], mmap=mmap, cache=str(tmp_path / "cache"))
