"""`model.shape_from`: the shape of a Hugging Face folder, and what is written beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from megadyn.commands.config import main as config_tool
from megadyn.commands.plan import headline
from megadyn.commands.plan import main as plan_tool
from megadyn.config import Config, load_config, save_config
from megadyn.config.config_map import to_hf_config
from megadyn.errors import UserError
from megadyn.planning.layouts import Machine
from tests.config.test_rope import RUN
from tests.helpers.servers import lay_out
from tests.helpers.tiny import tiny_config

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 160,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", QWEN3)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def written(base: Path, model: str = "") -> Path:
    path = base.parent / "run.yaml"
    path.write_text(f"{RUN}model: {{shape_from: {base}{model}}}\n")
    return path


def load(base: Path, model: str = "", *words: str) -> Config:
    return load_config(written(base, model), words)


def test_a_run_has_the_shape_of_the_folder(base: Path) -> None:
    model = load(base, ", routing: {kind: mod, capacity: 0.5}").model
    assert (model.hidden_size, model.num_layers, model.num_heads, model.num_kv_heads) == (96, 6, 8, 2)
    assert (model.head_dim, model.ffn_size, model.vocab_size, model.max_position) == (16, 160, 300, 4096)
    assert (model.norm_eps, model.init_std, model.tie_embeddings) == (1e-5, 0.03, True)
    assert (model.qk_norm, model.qkv_bias, model.output_bias) == (True, False, False)
    rope = model.rope
    assert (rope.type, rope.theta, rope.factor, rope.original_max_position) == ("yarn", 5e5, 4.0, 1024)
    assert (model.routing.kind, model.routing.capacity) == ("mod", 0.5)


def test_an_address_on_the_hub_is_a_shape_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_out(tmp_path / "hub", {"config.json": json.dumps(QWEN3).encode()}, "some/model")
    (tmp_path / "run.yaml").write_text(f"{RUN}model: {{shape_from: some/model}}\n")
    assert load_config(tmp_path / "run.yaml").model.hidden_size == 96


def test_the_window_is_part_of_the_shape(tmp_path: Path) -> None:
    slides = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 3}
    base = write(tmp_path / "base", QWEN3 | slides)
    config = load(base, ", window_layers: [3, 4, 5]")
    assert (config.model.sliding_window, config.model.window_layers) == (512, [3, 4, 5])
    assert "masks for the sliding window" in headline(config, Machine(1, 8))
    assert "sliding" not in headline(load(base, "", "training.sequence_length=512"), Machine(1, 8))
    with pytest.raises(UserError, match=r"^model\.sliding_window = 256: must be 512, "):
        load(base, ", sliding_window: 256")


def test_a_saved_configuration_needs_the_folder_no_more(base: Path) -> None:
    config = load(base)
    save_config(config, base.parent / "saved.yaml")
    (base / "config.json").unlink()
    assert load_config(base.parent / "saved.yaml") == config


def test_what_agrees_or_is_no_shape_may_stand_beside_it(base: Path) -> None:
    beside = ", hidden_size: 96, qk_norm: true, rope: {type: yarn, theta: 500000}, max_position: 8192, init_std: 0.02"
    model = load(base, beside, "model.attention=sdpa", "training.sequence_length=8192").model
    assert (model.max_position, model.init_std, model.attention) == (8192, 0.02, "sdpa")
    assert model.rope.factor == 4


def test_a_later_file_may_name_another_folder_or_none(base: Path) -> None:
    other = write(base.parent / "other", QWEN3 | {"num_hidden_layers": 3})
    assert load(base, "", f"model.shape_from={other}").model.num_layers == 3
    assert load(base, "", "model.shape_from=null").model.num_layers == 8


def test_of_an_export_the_shape_alone_is_taken(tmp_path: Path) -> None:
    theirs = tiny_config("mod").model
    base = write(tmp_path / "export", to_hf_config(theirs, "float32"))
    model = load(base, ", max_position: 1024").model
    assert (model.hidden_size, model.qkv_bias) == (theirs.hidden_size, True)
    assert model.layer_types == ["dense"] * 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "num_layers: 4",
            r"^model\.num_layers = 4: must be 6, as in the config\.json of model\.shape_from = .*base, or left out$",
        ),
        ("head_dim: null", r"^model\.head_dim = None: must be 16, "),
        ("qk_norm: false", r"^model\.qk_norm = False: must be True, "),
        ("normalization: lns", r"^model\.normalization = 'lns': must be 'pre', "),
        ("rope_theta: 1e6", r"^model\.rope\.theta = 1000000\.0: must be 500000\.0, "),
        ("rope: {type: default}", r"^model\.rope\.type = 'default': must be 'yarn', "),
        ("rope: {skip_layers: [1]}", r"^model\.rope\.skip_layers = \[1\]: must be \[\], "),
        (
            "hiden_size: 96",
            r"^model\.hiden_size: section 'model' has no such key \(did you mean 'hidden_size'",
        ),
    ],
)
def test_what_differs_is_refused_by_its_key(base: Path, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(base, f", {model}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma2"},
            r"^model\.shape_from = '.*': model_type 'gemma2' in config\.json: must be",
        ),
        ({"vocab_size": "many"}, r"^model\.shape_from = '.*': vocab_size = 'many' in config\.json"),
    ],
)
def test_a_model_that_is_none_of_ours_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = write(tmp_path / "base", QWEN3 | changes)
    with pytest.raises(UserError, match=message):
        load(base)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^model\.shape_from = '.*nowhere': no such file or folder, and not an address"
    ):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty': must be a Hugging Face folder, with a config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^model\.shape_from = '\$NOBODY/base': the environment variable"):
        load(tmp_path / "nowhere", "", "model.shape_from=$NOBODY/base")


def test_it_is_planned_and_shown_as_what_it_is(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(base, ", routing: {kind: mod}"))
    assert config_tool(["show", path]) == 0
    shown = capsys.readouterr().out
    assert "shape_from: null" in shown
    assert "num_layers: 6" in shown
    assert plan_tool([path, "training.global_batch_size=8", "--gpus", "2", "--gpu-memory", "8"]) == 0
    by_shape = capsys.readouterr().out
    (base.parent / "again.yaml").write_text(shown)
    again = str(base.parent / "again.yaml")
    assert plan_tool([again, "training.global_batch_size=8", "--gpus", "2", "--gpu-memory", "8"]) == 0
    assert capsys.readouterr().out == by_shape
