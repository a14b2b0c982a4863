"""The page of configuration keys that the site generates."""

import importlib.util
from types import ModuleType

import pytest

from megadyn.config.describe import keys
from tests.helpers.tiny import ROOT


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "docs/config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_there_with_a_text(reference: ModuleType) -> None:
    found = [key for _, _, some in reference.sections() for key in some]
    assert sorted(found, key=str) == sorted(keys(), key=str)
    assert not [key.name for key in found if not key.text]


def test_sections_are_in_a_readers_order(reference: ModuleType) -> None:
    titles = [title for title, _, _ in reference.sections()]
    assert titles[:4] == ["Top level", "model", "model.routing", "model.routing with kind dtf"]
    assert titles[-1] == "logging"


def test_the_page_shows_name_type_default_and_text(reference: ModuleType) -> None:
    page = reference.as_markdown()
    (seed,) = keys("training.seed")
    assert f"`training.seed`\n: *integer*, default `{seed.default}`. {seed.text}\n" in page
    assert "`output_dir`\n: *string*, required. " in page
    assert "`model.num_kv_heads`\n: *integer or null*, default `null`. " in page


def test_a_kinds_default_is_what_it_comes_to(reference: ModuleType) -> None:
    _, mod = reference.as_markdown().split("## model.routing with kind mod\n")
    assert "`model.routing.capacity`\n: *number or null*, default `0.125`. " in mod
