"""Output that appears under its final name only when it is complete."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megadyn.errors import UserError


def temporary_beside(path: Path) -> Path:
    """A fresh name in the folder of `path`: on the same file system, so that a rename is atomic."""
    return path.with_name(f".{path.name}.{os.urandom(16).hex()}.tmp")


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raises `UserError` if one of the outputs is there already and was not meant to be replaced."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; give --overwrite to replace it")


@contextmanager
def os_errors_named(subject: Path | str) -> Iterator[None]:
    """Turns an `OSError` (no permission, no space left) into the sentence that a user can act on.

    `subject` stands for the file where the error names none.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or subject}: {error.strerror or error}") from error


def readable(path: Path) -> None:
    """Gives a file the mode of any new one, where a library (safetensors) made it for the owner alone."""
    path.chmod(0o666 & ~_umask())


def executable(path: Path) -> None:
    """Gives a file the mode of a new program."""
    path.chmod(0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
