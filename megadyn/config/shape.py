"""`model.shape_from`: the shape of a Hugging Face folder's model, in place of the keys that say it one by one."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megadyn.config.config_map import FIELDS, from_hf_config
from megadyn.config.folders import another_form
from megadyn.config.model import ModelConfig
from megadyn.errors import ConfigError, UserError
from megadyn.files import read_json
from megadyn.hub import SHAPE, local_path
from megadyn.paths import expanded

SHAPE_FROM = "model.shape_from"
WINDOW = ("sliding_window", "window_layers")
KEYS = sorted(
    {*FIELDS, *WINDOW, "output_bias", "qk_norm", "normalization", "logit_softcap"}
    - {"max_position", "init_std"}
)
"""Keys of the model section that two models of one shape share, beside those of `model.rope`."""


def shape_of(model: ModelConfig, length: float = math.inf) -> dict[str, Any]:
    """By key of the model section, such as `rope.theta`. A window that no sequence of `length` tokens exceeds is none."""
    values = {key: getattr(model, key) for key in KEYS} | {
        f"rope.{key}": value for key, value in asdict(model.rope).items()
    }
    if model.sliding_window is not None and model.sliding_window >= length:
        values |= dict.fromkeys(WINDOW)
    return values


def folder_of(given: str, key: str) -> Path:
    """The folder with a config.json that `given`, the value of `key`, stands for: a path, or an address on the hub. Raises
    UserError if it is none."""
    folder = local_path(expanded(given, key), f"{key} = {given!r}", SHAPE)
    if form := another_form(folder):
        raise UserError(f"{key} = {given!r} {form}")
    if not (folder / "config.json").is_file():
        raise ConfigError(key, given, "a Hugging Face folder, with a config.json")
    return folder


def read_shape(given: str) -> ModelConfig:
    """The model that the folder's config.json describes, with every key of its shape filled in.

    Raises:
        UserError: no such folder, or a model that we cannot express.
    """
    folder = folder_of(given, SHAPE_FROM)
    config = read_json(folder / "config.json")
    try:
        return from_hf_config(config)
    except UserError as error:
        raise UserError(f"{SHAPE_FROM} = {given!r}: {error}") from None


def check_agrees(model: ModelConfig, shape: ModelConfig) -> None:
    """Raises ConfigError if a key that is written beside `model.shape_from` says something else."""
    here, there = shape_of(model), shape_of(shape)
    for key, want in there.items():
        if isinstance(here[key], list) and isinstance(want, list) and sorted(here[key]) == sorted(want):
            continue  # lists of layers, in any order
        if here[key] != want:
            raise ConfigError(
                f"model.{key}",
                here[key],
                f"{want!r}, as in the config.json of {SHAPE_FROM} = {model.shape_from}, or left out",
            )
