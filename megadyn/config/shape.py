"""`model.shape_from`: the shape of a Hugging Face folder's model, in place of the keys that say it one by one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megadyn.config.config_map import FIELDS, from_hf_config
from megadyn.config.dense_map import window_of
from megadyn.config.model import ModelConfig
from megadyn.errors import ConfigError, UserError
from megadyn.files import read_json
from megadyn.paths import expanded

SHAPE_FROM = "model.shape_from"
KEYS = sorted({*FIELDS, "output_bias", "qk_norm", "normalization"} - {"max_position", "init_std"})
"""Keys of the model section that two models of one shape share, beside those of `model.rope`."""


def shape_of(model: ModelConfig) -> dict[str, Any]:
    """By key of the model section, such as `rope.theta`."""
    return {key: getattr(model, key) for key in KEYS} | {
        f"rope.{key}": value for key, value in asdict(model.rope).items()
    }


def folder_of(given: str, key: str) -> Path:
    """The folder with a config.json that `given`, the value of `key`, stands for. Raises UserError if it is none."""
    folder = Path(expanded(given, key))
    if not (folder / "config.json").is_file():
        raise ConfigError(key, given, "a Hugging Face folder, with a config.json")
    return folder


def read_shape(given: str, length: int) -> ModelConfig:
    """The model that the folder's config.json describes, with every key of its shape filled in.

    Args:
        length: of the run's sequences, in tokens.

    Raises:
        UserError: no such folder, or a model that we cannot express.
    """
    folder = folder_of(given, SHAPE_FROM)
    config = read_json(folder / "config.json")
    try:
        model = from_hf_config(config)
    except UserError as error:
        raise UserError(f"{SHAPE_FROM} = {given!r}: {error}") from None
    check_window(window_of(config), length, f"{SHAPE_FROM} = {given!r}")
    return model


def check_window(window: int | None, length: int, where: str) -> None:
    """Raises UserError if a sliding window of config.json is shorter than sequences of `length` tokens."""
    if window is not None and window < length:
        raise UserError(
            f"{where}: sliding_window = {window} in config.json: must be at least training.sequence_length = {length}, "
            "because attention here sees the whole sequence"
        )


def check_agrees(model: ModelConfig, shape: ModelConfig) -> None:
    """Raises ConfigError if a key that is written beside `model.shape_from` says something else."""
    here, there = shape_of(model), shape_of(shape)
    for key, want in there.items():
        if here[key] != want:
            raise ConfigError(
                f"model.{key}",
                here[key],
                f"{want!r}, as in the config.json of {SHAPE_FROM} = {model.shape_from}, or left out",
            )
