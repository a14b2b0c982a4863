"""Which kind of routing a configuration asks for: keys of other kinds, layers of files, and kinds of other packages."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import megadyn.kinds
from megadyn.config import Config, load_config
from megadyn.config.kinds import FLAT
from megadyn.errors import ConfigError, UserError
from megadyn.kinds import BUILT_IN, find_kind, keys_of, known_kinds, make_kind, module_of
from tests.helpers.tiny import AS_SAVED

RUN = {
    "data": {"train": "corpus"},
    "tokenizer": {"path": "byte"},
    "training": {"iterations": 10},
    "output_dir": "out",
}
LAYERS = "class AnyLayer:\n    pass\n"
EXPORTED = "EXPORTED = None\n"
RECORD = """
from dataclasses import dataclass
from megadyn.kinds import Laid, TopK

@dataclass
class Mine(Laid, TopK):
    kind: str = "mine"
    strength: float = 1.0

    name = "mine"
    title = "a kind of one's own"
    sentence = "It does what it does."
    layers = {"mine": "AnyLayer"}
    recorded = (*TopK.recorded, "strength")

KIND = Mine
"""


def load(
    tmp_path: Path,
    *overrides: str,
    routing: dict[str, object] | None = None,
    extends: str = "",
    name: str = "run",
) -> Config:
    path = tmp_path / f"{name}.yaml"
    run: dict[str, object] = {"extends": extends} if extends else dict(RUN)
    path.write_text(yaml.safe_dump(run | ({"model": {"routing": routing}} if routing else {})))
    return load_config(path, overrides)


def refusal(*args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- keys of other kinds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key", "value", "owners"),
    [
        ("dtf", "jitter", 0.1, "dtrnet has"),
        ("dtf", "layout", "TDTDTDTD", "mod, dtrnet"),
        ("dense", "layout", "bilayer", "mod, dtrnet"),
        ("dense", "capacity", 0.5, "dtf, mod, dtrnet"),
        ("dense", "causal", "threshold", "dtf, mod, dtrnet"),
        ("mod", "ma_window", 7, "dtf, stt have"),
        ("dtrnet", "gate", "sigmoid", "mod has"),
    ],
)
def test_a_key_of_another_kind_is_refused_with_the_kinds_that_have_it(tmp_path, kind, key, value, owners):
    want = f"model.routing.{key}: routing kind {kind} has no such key ({owners}"
    assert refusal(tmp_path, f"model.routing.kind={kind}", f"model.routing.{key}={value}").startswith(want)
    assert refusal(tmp_path, routing={"kind": kind, key: value}).startswith(want)
    assert refusal(tmp_path, f"model.routing.{key}={value}", routing={"kind": kind}).startswith(want)
    with pytest.raises(
        ConfigError,
        match=rf"^model\.routing\.{key} = .*: must be left out: routing kind {kind} has no such key",
    ):
        make_kind(kind, **{key: value})


def test_a_key_that_no_kind_has_is_refused_with_the_nearest_one(tmp_path):
    assert refusal(tmp_path, "model.routing.kind=dtf", "model.routing.jiter=0.1") == (
        "model.routing.jiter: routing kind dtf has no such key (did you mean 'jitter'?)"
    )
    assert refusal(tmp_path, "model.routing.kind=dtf", "model.routing.xyzzy=1") == (
        "model.routing.xyzzy: routing kind dtf has no such key"
    )


# ---- layers of files -----------------------------------------------------------------------------


def test_a_later_layer_that_changes_the_kind_drops_what_earlier_ones_said_of_the_other(tmp_path):
    load(tmp_path, routing={"kind": "dtrnet", "jitter": 0.1, "capacity": 0.25, "layout": "T6D2"}, name="base")
    config = load(tmp_path, routing={"kind": "mod", "gate": "identity"}, extends="base.yaml")
    assert config.model.routing == make_kind("mod", capacity=0.25, layout="T6D2", gate="identity")
    by_word = load(
        tmp_path,
        "model.routing.kind=dtf",
        "model.routing.ma_window=3",
        routing={"kind": "mod", "gate": "identity"},
    )
    assert by_word.model.routing == make_kind("dtf", ma_window=3)


def test_it_does_not_drop_what_it_says_itself_or_what_comes_after(tmp_path):
    load(tmp_path, routing={"kind": "dtrnet", "jitter": 0.1}, name="base")
    assert "jitter" in refusal(tmp_path, routing={"kind": "mod", "jitter": 0.2}, extends="base.yaml")
    assert "jitter" in refusal(
        tmp_path, "model.routing.jitter=0.2", routing={"kind": "mod"}, extends="base.yaml"
    )


def test_a_layer_that_names_the_same_kind_again_excuses_nothing(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(RUN | {"model": {"routing": {"kind": "mod", "jitter": 0.1}}}))
    assert "jitter" in refusal(tmp_path, routing={"kind": "mod"}, extends="base.yaml")


# ---- what 0.1 saved ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "dtf", "mod", "dtrnet"])
def test_a_config_with_the_keys_of_all_kinds_as_it_was_saved_still_loads(tmp_path, kind):
    assert set(AS_SAVED) == FLAT
    routing = load(tmp_path, routing={"kind": kind, **AS_SAVED}).model.routing
    given = {key: value for key, value in AS_SAVED.items() if key in keys_of(find_kind(kind))}
    assert routing == make_kind(kind, **given)
    assert all(getattr(routing, key) == value for key, value in given.items())


def test_one_of_these_keys_less_and_they_are_what_a_person_wrote(tmp_path):
    some = {key: value for key, value in AS_SAVED.items() if key != "jitter"}
    assert "has no such key" in refusal(tmp_path, routing={"kind": "mod", **some})


# ---- kinds of other packages ---------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder `own_kinds/mine` with a whole kind, importable."""
    folder = tmp_path / "own_kinds" / "mine"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name, text in (("__init__", RECORD), ("layers", LAYERS), ("exported", EXPORTED)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield folder
    forget()


def forget() -> None:
    """As in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_kinds"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    find_kind.cache_clear()
    megadyn.kinds._installed.cache_clear()


def test_a_kind_by_the_path_of_its_package(tmp_path, package):
    config = load(tmp_path, "model.routing.kind=own_kinds.mine", "model.routing.strength=2")
    routing = config.model.routing
    assert (routing.kind, routing.name, routing.strength, routing.capacity) == (
        "own_kinds.mine",
        "mine",
        2.0,
        0.5,
    )
    assert config.model.layer_types == ["dense", "mine"] * 4
    assert module_of(type(routing), "layers").AnyLayer
    assert routing.to_export(config.model)["module"] == "own_kinds.mine"
    again = type(routing).from_export(routing.to_export(config.model), config.model.layer_types)
    assert (again.kind, again.strength, again.layout) == ("own_kinds.mine", 2.0, "TDTDTDTD")


def test_a_kind_by_entry_point(tmp_path, package):
    info = tmp_path / "own_kinds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-kinds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megadyn.kinds]\nmine = own_kinds.mine\n")
    forget()
    assert known_kinds() == (*BUILT_IN, "mine")
    assert load(tmp_path, "model.routing.kind=mine").model.routing.name == "mine"
    assert "did you mean 'mine'?" in refusal(tmp_path, "model.routing.kind=mind")
    assert "mine has" in refusal(tmp_path, "model.routing.kind=dense", "model.routing.strength=2")


def test_a_package_that_is_not_there_is_refused(tmp_path, package):
    assert refusal(tmp_path, "model.routing.kind=own_kinds.yours") == (
        "model.routing.kind = 'own_kinds.yours': must be a kind that can be imported: there is no module own_kinds.yours"
    )


def test_an_import_that_a_kind_itself_lacks_is_not_hidden(tmp_path, package):
    (package / "__init__.py").write_text("import a_module_that_is_nowhere\n" + RECORD)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_nowhere"):
        load(tmp_path, "model.routing.kind=own_kinds.mine")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("KIND = Mine", "", "KIND must be a dataclass derived from megadyn.kinds.Kind"),
        ("KIND = Mine", "KIND = 3", "KIND must be a dataclass derived from megadyn.kinds.Kind"),
        ('title = "a kind of one\'s own"', "", "Mine.title is missing: it must be a string"),
        ('name = "mine"', "", "Mine.name is missing: it must be a string"),
        ('sentence = "It does what it does."', "", "Mine.sentence is missing: it must be a string"),
        (
            'layers = {"mine": "AnyLayer"}',
            "",
            "Mine.layers is missing: it must map layer types to classes in layers.py",
        ),
        ("(Laid, TopK)", "(TopK)", "Mine.layer_types is missing: it must return the type of each layer"),
        ('"strength")', '"length")', "recorded names 'length', which is not a key of Mine"),
    ],
)
def test_a_kind_that_lacks_something_is_refused_in_one_sentence(tmp_path, package, old, new, said):
    assert old in RECORD
    (package / "__init__.py").write_text(RECORD.replace(old, new))
    assert refusal(tmp_path, "model.routing.kind=own_kinds.mine") == f"routing kind own_kinds.mine: {said}"


@pytest.mark.parametrize("part", ["layers", "exported"])
def test_a_kind_without_one_of_its_files_is_refused(tmp_path, package, part):
    (package / f"{part}.py").unlink()
    assert refusal(tmp_path, "model.routing.kind=own_kinds.mine") == (
        f"routing kind own_kinds.mine: {part}.py is missing next to its __init__.py"
    )
