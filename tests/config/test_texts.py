"""Every configuration key says what it is, and the schema for editors knows what the examples hold."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf

from megadyn.config import Config, Source
from megadyn.config.describe import REQUIRED, keys, schema, section_of, texts
from megadyn.errors import UserError
from megadyn.kinds import find_kind, keys_of, known_kinds
from tests.helpers.tiny import ROOT

KEYS = keys()
VALIDATOR = Draft202012Validator(schema())
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.parent.name != "tasks")


def sections(cls: type) -> Iterator[type]:
    """This section and those inside it."""
    yield cls
    for field in fields(cls):
        if inner := section_of(field):
            yield from sections(inner)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.name} {key.kind or ''}".strip())
def test_every_key_has_a_text_and_a_type(key: Any) -> None:
    assert key.text and key.type
    assert "\n" not in key.text


def test_every_section_and_every_part_of_one_has_a_text() -> None:
    for section in (*sections(Config), Source):
        missing = [f.name for f in fields(section) if f.name != "kind" and not texts(section).get(f.name)]
        assert not missing, section


def test_no_key_is_left_out() -> None:
    names = {key.name for key in KEYS}
    for kind in known_kinds():
        own = {key.name for key in KEYS if key.kind == kind} | {"model.routing.kind"}
        assert own == {f"model.routing.{name}" for name in keys_of(find_kind(kind))}
    assert {key.name for key in KEYS if key.default == REQUIRED} == {
        "data.train",
        "tokenizer.path",
        "output_dir",
    }
    assert {"training.seed", "optimizer.multipliers.router", "precision", "deepspeed_config"} <= names
    assert len(names) >= 110
    assert [key.name for key in keys("parallel")] == [
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.sequence",
    ]
    assert [key.type for key in keys("logging.profile_steps")] == ["list of integer or null"]


def test_a_section_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"^optimiser: no such section or key \(did you mean 'optimizer'\?\)$"
    ):
        keys("optimiser")


def test_texts_are_those_behind_the_fields_and_of_bases_too() -> None:
    @dataclass
    class Base:
        one: int = 1
        """Of the
        base."""
        two: int = 2

    @dataclass
    class Derived(Base):
        two: int = 3
        """Its own."""

    assert texts(Derived) == {"one": "Of the base.", "two": "Its own."}
    assert texts(Base) == {"one": "Of the base."}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT / "examples").as_posix())
def test_examples_fit_the_schema(path: Path) -> None:
    content = OmegaConf.to_container(OmegaConf.load(path))
    VALIDATOR.validate(content)


def test_the_schema_is_one_and_json() -> None:
    Draft202012Validator.check_schema(schema())
    assert json.loads(json.dumps(schema(), allow_nan=False)) == schema()


@pytest.mark.parametrize(
    "text",
    [
        "trainig: {iterations: 5}",
        "training: {iteration: 5}",
        "training: {iterations: many}",
        "training: 5",
        "training: {tokens: lots}",
        "logging: {profile_ranks: [a]}",
        "model: {routing: {kind: mod, prior_factor: 0.5}}",
        "model: {routing: {kind: dense, capacity: 0.5}}",
        "model: {routing: {capasity: 0.5}}",
        "parallel: {sequence: 3}",
        "extends: 3",
    ],
)
def test_what_a_run_would_refuse_does_not_fit(text: str) -> None:
    assert not VALIDATOR.is_valid(OmegaConf.to_container(OmegaConf.create(text)))


@pytest.mark.parametrize(
    "text",
    [
        "extends: [a.yaml, b.yaml]",
        "training: {tokens: 300B, sequence_length: '${model.max_position}'}",
        "training: {tokens: 3e9, iterations: null}",
        "data: {train: [{prefix: a, weight: 0.5}, b]}",
        "model: {routing: {kind: mod, capacity: 0.5}}",
        "model: {routing: {capacity: 0.5}}",
        "model: {routing: {kind: my_package.my_kind, of_its_own: 3}}",
    ],
)
def test_what_a_run_takes_fits(text: str) -> None:
    VALIDATOR.validate(OmegaConf.to_container(OmegaConf.create(text)))
