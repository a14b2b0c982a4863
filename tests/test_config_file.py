"""Files that extend files: the nearest value counts, and what cannot be read is named with the file that asked for it."""

from pathlib import Path

import pytest

from megadyn.config import load_config
from megadyn.errors import UserError

BASE = """
data: {train: corpus}
tokenizer: {path: byte}
model: {hidden_size: 64, num_layers: 4, routing: {kind: dtf, capacity: 0.25}}
training: {iterations: 10}
output_dir: base
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "bases" / "base.yaml", BASE)


def test_a_file_stands_over_what_it_extends_and_the_command_line_over_both(base, tmp_path, monkeypatch):
    middle = write(
        base.parent / "middle.yaml", "extends: base.yaml\nmodel: {num_layers: 6}\noutput_dir: middle\n"
    )
    own = write(
        tmp_path / "own" / "run.yaml", "extends: ../bases/middle.yaml\nmodel: {routing: {capacity: 0.5}}\n"
    )
    monkeypatch.chdir(base.parent)  # paths are relative to the file that holds them, wherever one works
    config = load_config(own, ["model.num_heads=4"])
    model = config.model
    assert (model.hidden_size, model.num_layers, model.num_heads) == (64, 6, 4)
    assert (model.routing.kind, model.routing.capacity, config.output_dir) == ("dtf", 0.5, "middle")
    assert load_config(middle).model.routing.capacity == 0.25


def test_of_several_extended_files_the_last_one_counts(base, tmp_path):
    machine = write(base.parent / "machine.yaml", "parallel: {tensor: 2}\nmodel: {num_layers: 2}\n")
    run = write(tmp_path / "run.yaml", f"extends: [bases/base.yaml, {machine}]\n")
    assert (load_config(run).model.num_layers, load_config(run).parallel.tensor) == (2, 2)
    run = write(tmp_path / "run.yaml", f"extends: [{machine}, bases/base.yaml]\n")
    assert (load_config(run).model.num_layers, load_config(run).parallel.tensor) == (4, 2)


def test_two_ways_to_one_file_are_no_circle(base, tmp_path):
    for name in ("left", "right"):
        write(base.parent / f"{name}.yaml", "extends: base.yaml\n")
    assert (
        load_config(write(tmp_path / "run.yaml", "extends: [bases/left.yaml, bases/right.yaml]\n")).output_dir
        == "base"
    )


def test_a_circle_is_refused_with_its_files(tmp_path):
    first = write(tmp_path / "first.yaml", "extends: second.yaml\n")
    second = write(tmp_path / "second.yaml", "extends: ./first.yaml\n")
    assert refusal(first) == f"{first}: extends itself: {first} -> {second} -> {first}"
    alone = write(tmp_path / "alone.yaml", "extends: alone.yaml\n")
    assert refusal(alone) == f"{alone}: extends itself: {alone} -> {alone}"


def test_a_missing_or_malformed_base_is_named_with_the_file_that_extends_it(base, tmp_path):
    run = write(tmp_path / "run.yaml", "extends: bases/bose.yaml\n")
    assert refusal(run) == f"{tmp_path}/bases/bose.yaml: No such file or directory (extended by {run})"
    base.write_text("model: [1, 2\n")
    write(run, "extends: bases/base.yaml\n")
    message = refusal(run)
    assert message.startswith(f"{base}: not valid YAML: ") and message.endswith(f"(extended by {run})")
    base.write_text("model: 3\n")
    assert f"is 3 in {base}" in refusal(run)


@pytest.mark.parametrize("value", ["3", "{a: b}", "[base.yaml, 3]", "''", "null", "[[base.yaml]]"])
def test_extends_that_is_no_path_is_refused(value, tmp_path):
    run = write(tmp_path / "run.yaml", f"extends: {value}\n")
    assert refusal(run).startswith(f"{run}: extends = ")


def test_extends_on_the_command_line_is_refused(base):
    assert (
        refusal(base, "extends=other.yaml")
        == "extends: is a key of configuration files, not of the command line"
    )
