"""The page of configuration keys that the site generates."""

import importlib.util
import json
from types import ModuleType

import pytest

from megadyn.config import Config
from megadyn.kinds import find_kind, keys_of, known_kinds
from tests.tiny import ROOT


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "docs/config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_there_with_a_text(reference: ModuleType) -> None:
    keys = [key for section in reference.all_sections() for key in section.keys]
    assert not [key.name for key in keys if not key.text]
    names = {key.name for key in keys}
    assert {"output_dir", "data.train", "training.spike_factor", "optimizer.multipliers.router"} <= names
    for kind in known_kinds():
        assert {f"model.routing.{key}" for key in keys_of(find_kind(kind))} <= names, kind


def test_defaults_are_those_of_the_configuration(reference: ModuleType) -> None:
    keys = {key.name: key for section in reference.all_sections() for key in section.keys}
    assert {name for name, key in keys.items() if key.default == "required"} == {
        "output_dir",
        "data.train",
        "tokenizer.path",
    }
    assert json.loads(keys["training.seed"].default) == Config().training.seed
    assert json.loads(keys["model.routing.kind"].default) == Config().model.routing.kind
    assert keys["model.num_kv_heads"].type == "integer or null"


def test_a_kinds_default_is_what_it_comes_to(reference: ModuleType) -> None:
    (mod,) = [section for section in reference.all_sections() if section.title.endswith("kind mod")]
    (capacity,) = [key for key in mod.keys if key.name == "model.routing.capacity"]
    assert capacity.default == "0.125"


def test_the_page_shows_name_type_default_and_text(reference: ModuleType) -> None:
    page = reference.as_markdown(
        [reference.Section("a", "why", [reference.Key("a.b", "integer", "3", "How many.")])]
    )
    assert "## a\n\nwhy\n\n`a.b`\n: *integer*, default `3`. How many.\n" in page
