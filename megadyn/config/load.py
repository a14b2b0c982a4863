"""Reads a run's configuration from YAML and `key=value`, and writes it.

`load_config` runs on one CPU before any process group exists. Relative paths are relative to the working directory, except
that paths in `extends` are relative to their file; `deepspeed_config` may be either.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megadyn.config.engine_file import found_beside
from megadyn.config.file import EXTENDS, config_layers
from megadyn.config.kinds import settle_kind
from megadyn.config.model import ModelConfig
from megadyn.config.numbers import COUNTED, count
from megadyn.config.phases import have_lengths, with_phases
from megadyn.config.rope import with_rope_section
from megadyn.config.run import Config
from megadyn.config.shape import check_agrees, read_shape
from megadyn.errors import UserError, did_you_mean
from megadyn.kinds.older import with_newer_keys

REQUIRED = {
    "output_dir": "a folder for everything that the run writes",
    "data.train": "the prefix of an indexed dataset, or a list of them",
    "tokenizer.path": "a folder with tokenizer.json, a SentencePiece .model file, ORG/NAME on the Hugging Face hub, or byte",
}
"""Keys without a default, and what to give for them."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration from a YAML file, the files that it `extends`, and `key=value` overrides.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, invalid value or combination.
    """
    files = config_layers(Path(path))
    for file, content in files:
        found_beside(content, file)
    for word in overrides:
        if not re.match(r"[\w-]+(\.[\w-]+)*=", word):
            raise UserError(f"{word!r} on the command line: must be of the form key=value")
    try:
        words = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:  # the YAML library has no common base for its errors
        raise UserError(f"the command line: not valid YAML: {' '.join(str(error).split())}") from None
    layers = []
    for source, given in (*files, ("the command line", words)):
        _check_sections(Config, given, "", str(source))
        _read_counts(given)
        layers.append((source, with_newer_keys(with_rope_section(given, str(source)), str(source))))
    kind = settle_kind(layers)
    try:
        config = _merged(ModelConfig(routing=kind()), layers)
        if config.model.shape_from is not None:
            shape = read_shape(config.model.shape_from)
            config = _merged(replace(shape, routing=kind()), layers)
            check_agrees(config.model, shape)
            config.model.shape_from = None  # from here on its values stand in its place
    except ConfigKeyError as error:
        raise _unknown_key(str(error.full_key)) from None
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UserError(f"{key} is missing in {path}: give {REQUIRED.get(key, 'it')}") from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise UserError(f"{error.full_key or path}: {reason}") from None
    return with_phases(config) if config.is_in_parts else config.checked()


def _merged(model: ModelConfig, layers: Sequence[tuple[object, Any]]) -> Config:
    """The values of `layers` over the defaults, with `model` as the model section's."""
    defaults = OmegaConf.structured(Config(model=model))
    config = OmegaConf.to_object(OmegaConf.merge(defaults, *(given for _, given in layers)))
    assert isinstance(config, Config)
    return config


def _check_sections(section: Any, given: Any, name: str, source: str) -> None:
    """Checks that sections hold keys, because OmegaConf's error for a plain value does not name the section."""
    if not isinstance(given, dict):
        known = ", ".join(f.name for f in fields(section))
        raise UserError(
            f"{name or source}: must hold keys ({known}), is {given!r}" + (f" in {source}" if name else "")
        )
    for f in fields(section):
        if f.name in given and is_dataclass(f.default_factory):
            _check_sections(f.default_factory, given[f.name], f"{name}.{f.name}".lstrip("."), source)


def _read_counts(given: dict[str, Any]) -> None:
    """Converts counts such as 3e9 or 300B to numbers. References to other keys are left for the merge to resolve."""
    for key in COUNTED:
        section, _, name = key.partition(".")
        value = given.get(section, {}).get(name)
        if value is not None and not (isinstance(value, str) and "${" in value):
            given[section][name] = count(key, value)


def _unknown_key(full_key: str) -> UserError:
    if full_key == EXTENDS:
        return UserError(f"{EXTENDS}: is a key of configuration files, not of the command line")
    section: Any = Config
    *path, name = full_key.split(".")
    for part in path:
        section = next(f.default_factory for f in fields(section) if f.name == part)
        assert is_dataclass(section)
    where = f"section {'.'.join(path)!r}" if path else "the configuration"
    return UserError(
        f"{full_key}: {where} has no such key{did_you_mean(name, [f.name for f in fields(section)])}"
    )


def resolved_config(config: Config) -> dict[str, Any]:
    """The configuration as plain values. The length of the run is kept in its original unit, so that a run resumed with
    another batch size still means the same number of tokens."""
    resolved: dict[str, Any] = _plain(asdict(config))
    if length := config.training.length:
        resolved["training"] |= {"iterations": None, length.unit: length.amount}
    elif have_lengths(config.phases):
        resolved["training"]["iterations"] = None  # the phases make up the run
    return resolved


def _plain(value: Any) -> Any:
    """With lists for tuples, as YAML has it."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def save_config(config: Config, path: Path) -> None:
    OmegaConf.save(OmegaConf.create(resolved_config(config)), path)
