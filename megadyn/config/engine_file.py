"""Resolves `deepspeed_config`: the name of a file that comes with megadyn, or a path."""

from pathlib import Path
from typing import Any

from megadyn.errors import ConfigError

KEY = "deepspeed_config"
FOLDER = Path(__file__).parents[1] / "ds_configs"
"""In a checkout this is a link to the top-level folder, so that installed packages and checkouts find the same files."""


def shipped_names() -> tuple[str, ...]:
    """Names of the files that come with megadyn: zero0, zero1, ..."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def engine_file(value: str) -> Path:
    """The file that a value of `deepspeed_config` refers to. A path need not exist."""
    return FOLDER / f"{value}.json" if value in shipped_names() else Path(value)


def read_engine_file(value: str) -> str:
    """The text of that file. Raises ConfigError if it cannot be read."""
    try:
        return engine_file(value).read_text()
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError:
        reason = "not UTF-8"
    names = shipped_names()
    same = Path(value).stem
    meant = f"; {same} without folder and suffix is the one that comes with megadyn" if same in names else ""
    raise ConfigError(KEY, value, f"one of {', '.join(names)}, or a readable file ({reason}{meant})")


def found_beside(given: Any, file: Path) -> None:
    """Resolves a relative path in `given`, the content of a configuration file, against the folder of that file as well.

    Names, and paths that exist relative to the working directory, are kept. A path found next to the file becomes
    absolute, so that the `config.yaml` of an output folder means the same everywhere.
    """
    value = given.get(KEY) if isinstance(given, dict) else None
    if not isinstance(value, str) or "$" in value or value.startswith("~") or value in shipped_names():
        return
    beside = file.parent / value
    if not Path(value).exists() and beside.exists():
        given[KEY] = str(beside.absolute())
