"""Where `deepspeed_config` leads: a file that comes with megadyn, by its name, or a path."""

from pathlib import Path
from typing import Any

from megadyn.errors import ConfigError

KEY = "deepspeed_config"
FOLDER = Path(__file__).parents[1] / "ds_configs"
"""In a checkout a link to the folder at the top, so that an installed package and a checkout find the same files."""


def shipped_names() -> tuple[str, ...]:
    """Names of the files that come with megadyn: zero0, zero1, ..."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def engine_file(value: str) -> Path:
    """The file that a value of `deepspeed_config` means. It need not exist, unless the value is a name."""
    return FOLDER / f"{value}.json" if value in shipped_names() else Path(value)


def read_engine_file(value: str) -> str:
    """Text of that file. Raises ConfigError if it cannot be read."""
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
    """Lets a relative path in `given`, the content of a configuration file, count from the folder of that file too.

    A path that exists from the working directory keeps its meaning, and so does a name. What is found beside the file
    becomes an absolute path, so that the `config.yaml` of an output folder means the same everywhere.
    """
    value = given.get(KEY) if isinstance(given, dict) else None
    if not isinstance(value, str) or "$" in value or value.startswith("~") or value in shipped_names():
        return
    beside = file.parent / value
    if not Path(value).exists() and beside.exists():
        given[KEY] = str(beside.absolute())
