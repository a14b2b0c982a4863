"""Reads YAML configuration files together with the files that they extend."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megadyn.errors import ConfigError, UserError
from megadyn.paths import expanded

EXTENDS = "extends"
"""Key for the path of another file, or a list of paths, relative to this file's folder."""


def config_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[tuple[Path, Any]]:
    """The content of `path`, after the contents of the files that it extends. For each key the last value wins.

    Args:
        chain: the files that led here; each extends the next.

    Raises:
        UserError: a file is missing, empty or not valid YAML, or extends itself, directly or through others.
    """
    came_from = f" (extended by {chain[-1]})" if chain else ""
    if path.resolve() in [earlier.resolve() for earlier in chain]:
        raise UserError(f"{path}: extends itself: {' -> '.join(map(str, (*chain, path)))}")
    try:
        own = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}{came_from}") from None
    except Exception as error:  # the YAML library has no common base for its errors
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}{came_from}") from None
    if own in ({}, None):
        raise UserError(f"{path}: is empty{came_from}")
    extended = own.pop(EXTENDS, []) if isinstance(own, dict) else []
    names = extended if isinstance(extended, list) else [extended]
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{path}: {EXTENDS}", extended, "a path relative to this file, or a list of them")
    bases = [path.parent / expanded(name, f"{path}: {EXTENDS}") for name in names]
    return [layer for base in bases for layer in config_layers(base, (*chain, path))] + [(path, own)]
