"""The section `model.rope`, and the older name of its base."""

from pathlib import Path

import pytest

from megadyn.config import load_config, save_config
from megadyn.errors import UserError

RUN = "output_dir: out\ntokenizer: {path: byte}\ndata: {train: text}\ntraining: {iterations: 1}\n"


def written(folder: Path, model: str) -> Path:
    (folder / "config.yaml").write_text(f"{RUN}model: {model}\n")
    return folder / "config.yaml"


def test_the_older_name_of_the_base_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "{rope_theta: 5e5, num_layers: 4}")
    assert load_config(path).model.rope.theta == 5e5
    assert load_config(path, ["model.rope.theta=7e4"]).model.rope.theta == 7e4
    (tmp_path / "later.yaml").write_text("extends: config.yaml\nmodel: {rope: {theta: 3000}}\n")
    assert load_config(tmp_path / "later.yaml").model.rope.theta == 3000
    assert load_config(tmp_path / "later.yaml", ["model.rope_theta=400"]).model.rope.theta == 400


def test_both_names_in_one_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "{rope_theta: 5e5, rope: {theta: 5e5}}")
    with pytest.raises(UserError, match=r"model\.rope_theta in .* older spelling of model\.rope\.theta"):
        load_config(path)


def test_a_section_is_kept_and_read_again(tmp_path: Path) -> None:
    model = "{rope: {type: yarn, factor: 4, original_max_position: 1024, skip_layers: [5, 2, 5]}}"
    config = load_config(written(tmp_path, model))
    assert config.model.rope.skip_layers == [2, 5]
    assert (config.model.rope.beta_fast, config.model.rope.beta_slow) == (32, 1)
    assert config.model.rope.attention_factor == pytest.approx(1.1386, rel=1e-4)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.rope=5"], r"^model\.rope: must hold keys \(type, theta, .*is 5 in the command line$"),
        (["model.rope_theta=5e5", "model.rope=5"], r"^model\.rope: must hold keys"),
        (["model.rope.beta=5"], r"^model\.rope\.beta: section 'model\.rope' has no such key"),
        (["model.rope_theta=much"], r"^model\.rope\.theta: "),
    ],
)
def test_what_is_no_section_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(written(tmp_path, "{num_layers: 4}"), words)
