"""Reads JSON, and writes output that appears under its final name only when it is complete."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megadyn.errors import UserError


def temporary_beside(path: Path) -> Path:
    """An unused name in the folder of `path`, so that renaming stays on one file system and is atomic."""
    return path.with_name(f".{path.name}.{os.urandom(16).hex()}.tmp")


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raises `UserError` if an output exists and must not be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; give --overwrite to replace it")


@contextmanager
def os_errors_named(subject: Path | str) -> Iterator[None]:
    """Turns an `OSError` (no permission, no space left) into a sentence that helps the user.

    `subject` names the file if the error does not.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or subject}: {error.strerror or error}") from error


def readable(path: Path) -> None:
    """Gives a file the default mode of new files, because safetensors creates files that only the owner can read."""
    path.chmod(0o666 & ~_umask())


def executable(path: Path) -> None:
    """Gives a file the default mode of new programs."""
    path.chmod(0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError unless `path` holds one JSON object."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return content
