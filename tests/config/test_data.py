"""The `data` section: one dataset or a blend, separate held-out sets or a split; what cannot be is refused by key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megadyn.config import load_config, save_config
from megadyn.config.data import DataConfig, Source
from megadyn.errors import UserError

RUN = {"tokenizer": {"path": "byte"}, "training": {"iterations": 10}, "output_dir": "out"}


def load(tmp_path: Path, *overrides: str, **data: Any) -> DataConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | {"data": {"train": "corpus"} | data}))
    config = load_config(path, overrides)
    save_config(config, path)
    assert load_config(path).data == config.data  # the resolved configuration means the same
    return config.data


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a", [Source("a")]),
        (["a", "b"], [Source("a"), Source("b")]),
        (["a", {"prefix": "b"}], [Source("a"), Source("b")]),
        ({"prefix": "a", "weight": 3}, [Source("a", 3.0)]),
        (
            [{"prefix": "a", "weight": 0.25}, {"weight": 3, "prefix": "b"}],
            [Source("a", 0.25), Source("b", 3.0)],
        ),
        (
            [{"prefix": "a", "tokens": 10**12}, {"prefix": "b", "tokens": 1}],
            [Source("a", 1e12), Source("b", 1.0)],
        ),
    ],
)
@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_dataset_or_a_blend(tmp_path, given, found, name):
    assert load(tmp_path, **{name: given}).sources(name) == found


def test_a_blend_may_replace_a_dataset_on_the_command_line(tmp_path):
    section = load(tmp_path, "data.train=[{prefix: a, weight: 1}, {prefix: b, weight: 2}]")
    assert section.sources("train") == [Source("a", 1.0), Source("b", 2.0)]
    section = load(tmp_path, "data.train=[{prefix: a, tokens: 2e12}, {prefix: b, tokens: 1_000}]")
    assert section.sources("train") == [Source("a", 2e12), Source("b", 1000.0)]
    assert load(tmp_path, "data.train=a", train=["b", "c"]).sources("train") == [Source("a")]


def test_validation_sets_may_have_names(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    blend = [{"prefix": "a", "weight": 1}, {"prefix": "b", "weight": 2}]
    section = load(tmp_path, validation={"code": "$DATA/code", "web-2.0": blend, "one": {"prefix": "c"}})
    assert section.validation_sources() == {
        "code": [Source("/data/code")],
        "web-2.0": [Source("a", 1.0), Source("b", 2.0)],
        "one": [Source("c")],
    }
    assert section.validation_names == ["code", "one", "web-2.0"]  # as the file has them
    assert section.split == [1.0, 0.0, 0.0]
    section = load(tmp_path, "data.validation.web=w", validation={"code": "c"})
    assert section.validation_sources() == {"code": [Source("c")], "web": [Source("w")]}


def test_a_set_without_a_name_is_called_validation(tmp_path):
    one = {"prefix": "v", "weight": 2}
    assert load(tmp_path, validation=one).validation_sources() == {"": [Source("v", 2.0)]}
    assert load(tmp_path, validation=one).validation_names == ["validation"]
    assert load(tmp_path).validation_names == ["validation"]  # split off
    assert load(tmp_path, validation_fraction=0).validation_names == []


def test_held_out_sets_are_none_unless_named(tmp_path):
    section = load(tmp_path)
    assert section.sources("validation") == section.sources("test") == []


@pytest.mark.parametrize(
    ("data", "split"),
    [
        ({}, [0.99, 0.01, 0.0]),
        ({"validation_fraction": 0.1}, [0.9, 0.1, 0.0]),
        ({"validation_fraction": 0}, [1.0, 0.0, 0.0]),
        ({"validation": "v"}, [1.0, 0.0, 0.0]),
        ({"validation": "v", "validation_fraction": 0.1}, [1.0, 0.0, 0.0]),
        ({"validation": "v", "split": [0.9, 0, 0.1]}, [0.9, 0.0, 0.1]),
        ({"validation": "v", "test": "t"}, [1.0, 0.0, 0.0]),
        ({"split": [0.8, 0.15, 0.05]}, [0.8, 0.15, 0.05]),
        ({"split": [1, 0, 0]}, [1.0, 0.0, 0.0]),
    ],
)
def test_the_split_is_stated_once(tmp_path, data, split):
    section = load(tmp_path, **data)
    assert (section.split, section.validation_fraction) == (split, None)


THREE = "three shares, of training (above 0), validation and test, that sum to 1"
PREFIX = "a dataset's prefix, or {prefix: ..., weight: ...}, or {prefix: ..., tokens: ...}"
POSITIVE = "a number above 0 (remove a dataset that should not be used)"


@pytest.mark.parametrize(
    ("data", "key", "want"),
    [
        (
            {"validation_fraction": 0.1, "split": [0.9, 0.1, 0]},
            "data.validation_fraction",
            "left out where data.split is given",
        ),
        *(
            ({"split": shares}, "data.split", THREE)
            for shares in (
                [],
                [1],
                [0.9, 0.1],
                [0.8, 0.1, 0.2],
                [1.1, -0.1, 0],
                [0, 0.5, 0.5],
                [98, 1, 1],
                [float("nan"), 0, 1],
                [0.5, float("nan"), 0.5],
                [0.5, 0.5, 0, 0],
            )
        ),
        (
            {"split": [0.8, 0.1, 0.1], "validation": "v"},
            "data.split",
            "0 for the validation set, because data.validation names",
        ),
        (
            {"split": [0.9, 0, 0.1], "test": "t"},
            "data.split",
            "0 for the test set, because data.test names a separate one",
        ),
        ({"train": []}, "data.train", "a prefix, or a list of at least one"),
        ({"validation": []}, "data.validation", "a prefix, or a list of at least one"),
        *(
            ({"train": bad}, "data.train", PREFIX)
            for bad in (None, 3, "", {"weight": 1}, {"prefix": 3}, {"prefix": ""})
        ),
        *(({"train": ["a", bad]}, "data.train[1]", PREFIX) for bad in (None, 3, "", ["b"], {"weight": 1})),
        ({"train": [{"prefix": "a", "wieght": 1}]}, "data.train[0].wieght", "did you mean 'weight'?"),
        (
            {"train": [{"prefix": "a", "weight": 1, "tokens": 1}]},
            "data.train[0]",
            "given a weight or tokens, not both",
        ),
        *(
            ({"train": [{"prefix": "a", "weight": bad}]}, "data.train[0].weight", POSITIVE)
            for bad in (0, -1, "much", None, True, float("inf"), float("nan"))
        ),
        ({"train": [{"prefix": "a", "tokens": 0}]}, "data.train[0].tokens", POSITIVE),
        (
            {"train": [{"prefix": "a", "weight": 1}, "b"]},
            "data.train[1]",
            "given like the first, with weight",
        ),
        (
            {"train": ["a", {"prefix": "b", "tokens": 1}]},
            "data.train[1]",
            "given like the first, with only a prefix",
        ),
        (
            {"train": [{"prefix": "a", "weight": 1}, {"prefix": "b", "tokens": 1}]},
            "data.train[1]",
            "given like the first, with weight",
        ),
        ({"train": ["a", "b", "a"]}, "data.train[2].prefix", "named once, with the sum of its shares"),
        ({"test": ["a", "a"]}, "data.test[1].prefix", "named once"),
        ({"test": {"code": "a"}}, "data.test", PREFIX),
        ({"validation": {}}, "data.validation", PREFIX),
        ({"validation": {"a/b": "x"}}, "data.validation", "a name of letters, digits, '.', '_' and '-'"),
        ({"validation": {"a,b": "x"}}, "data.validation", "a name of letters"),
        ({"validation": {"code": None}}, "data.validation.code", PREFIX),
        ({"validation": {"code": ["a", "a"]}}, "data.validation.code[1].prefix", "named once"),
        (
            {"validation": {"code": "a"}, "split": [0.8, 0.1, 0.1]},
            "data.split",
            "0 for the validation set, because data.validation names",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_key(tmp_path, data, key, want):
    with pytest.raises(UserError) as caught:
        load(tmp_path, **data)
    message = str(caught.value)
    assert message.startswith(f"{key} = ")
    assert want in message.partition(": must be ")[2]
    assert "\n" not in message
