"""Paths mean what they mean in a shell, wherever one is read."""

from pathlib import Path

import pytest

from megadyn.arguments import output_prefix
from megadyn.config import load_config
from megadyn.config.numbers import count
from megadyn.errors import ConfigError, UserError
from megadyn.paths import expanded
from tests.helpers.tiny import ROOT

PATHS = """
data: {train: [{prefix: $CORPUS/web, weight: 1}, {prefix: ~/code, weight: 2}], validation: ~/held-out, cache: $CORPUS/cache}
tokenizer: {path: ~/tokenizer}
training: {iterations: 10}
checkpoint: {fork_from: $CORPUS/run}
deepspeed_config: $CORPUS/zero1.json
output_dir: ~/x
"""


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPUS", "/data/corpus")
    monkeypatch.setenv("NOTHING", "")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("$CORPUS/x", "/data/corpus/x"),
        ("${CORPUS}x", "/data/corpusx"),
        ("a/~/b", "a/~/b"),
        ("a$/b", "a$/b"),
        ("plain", "plain"),
        ("byte", "byte"),
        ("", ""),
    ],
)
def test_home_and_variables_are_replaced(text: str, want: str) -> None:
    assert expanded(text) == want


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$NOWHERE/x", "output_dir = '$NOWHERE/x': the environment variable NOWHERE is not set"),
        ("$NOTHING/x", "NOTHING is not set, or is empty"),
        ("~nobody-of-this-name/x", "no home folder of ~nobody-of-this-name"),
    ],
)
def test_what_has_no_value_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        expanded(text, "output_dir")
    assert said in str(caught.value)


def test_every_path_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASES", str(tmp_path))
    (tmp_path / "base.yaml").write_text(PATHS)
    (tmp_path / "run.yaml").write_text("extends: $BASES/base.yaml\n")
    config = load_config(tmp_path / "run.yaml")
    assert [source.prefix for source in config.data.sources("train")] == ["/data/corpus/web", "/home/me/code"]
    assert (config.data.validation, config.data.cache) == ("/home/me/held-out", "/data/corpus/cache")
    assert (config.tokenizer.path, config.output_dir) == ("/home/me/tokenizer", "/home/me/x")
    assert (config.checkpoint.fork_from, config.deepspeed_config) == (
        "/data/corpus/run",
        "/data/corpus/zero1.json",
    )
    assert (
        load_config(
            tmp_path / "run.yaml", ["checkpoint.resume=~/y", "checkpoint.fork_from=null"]
        ).checkpoint.fork_from
        == "/home/me/y"
    )
    with pytest.raises(UserError, match=r"data\.train\[0\] = '\$NOWHERE/a'"):
        load_config(tmp_path / "run.yaml", ["data.train=[$NOWHERE/a]"])


def test_a_tools_output_prefix() -> None:
    assert output_prefix("~/data/web") == Path("/home/me/data/web")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (3, 3),
        (3e9, 3 * 10**9),
        ("3e9", 3 * 10**9),
        ("300B", 3 * 10**11),
        ("2M", 2 * 10**6),
        ("1.5T", 15 * 10**11),
        ("10k", 10**4),
        ("4 b", 4 * 10**9),
        ("3_000", 3000),
        ("3,000", 3000),
        ("0.5K", 500),
        (2**60 + 1, 2**60 + 1),
        ("1e3K", 10**6),
    ],
)
def test_counts_as_people_write_them(given: object, want: int) -> None:
    assert count("training.tokens", given) == want


@pytest.mark.parametrize(
    "given", ["many", "", "3X", "1.5", 1.5, True, "-3", "nan", float("nan"), float("inf"), [3], "3e-2", "0.5"]
)
def test_what_is_no_count_is_refused_by_key(given: object) -> None:
    with pytest.raises(
        ConfigError, match=r"^training\.tokens = .*: must be a whole number, which may be written as"
    ):
        count("training.tokens", given)


def test_no_tool_takes_a_path_as_it_stands() -> None:
    """`user_path` replaces ~ and variables; a plain `Path` would make a folder of that name."""
    sources = [path for room in ("megadyn", "tools") for path in sorted((ROOT / room).rglob("*.py"))]
    assert not [str(path) for path in sources if "type=Path" in path.read_text()]
