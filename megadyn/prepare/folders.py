"""The files that a path refers to, and which of those in a folder are not part of a corpus."""

import glob
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadyn.errors import UserError

HUB_FILES = ("README.md", "dataset_infos.json")
"""Files of a Hugging Face hub repository that describe it: its card, and the description of its data files."""
SPARK_FILES = re.compile(r"_SUCCESS|_(common_)?metadata|_(committed|started)_\d+|_temporary|_delta_log")
"""Files that Spark and similar tools write next to the data."""
SNAPSHOT = re.compile(r"[0-9a-f]{40}")


def matches(path: Path) -> list[Path]:
    """`path` itself; if it does not exist, what it matches as a pattern, sorted by name."""
    if path.exists():
        return [path]
    found = {Path(name) for name in glob.glob(str(path), recursive=True)}
    if not found:
        raise UserError(f"{path}: no such file or folder")
    # A matched folder already includes what is inside it.
    return sorted(match for match in found if found.isdisjoint(match.parents))


def files_below(path: Path, left_out: Counter[str], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """`path` itself if it is a file, otherwise every file below it, each folder sorted by name.

    Files that are not part of a corpus are counted in `left_out`, by kind; a hidden folder counts as one.
    """
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: neither a file nor a folder")
        yield path
        return
    here = path.resolve()
    if here in above:
        raise UserError(f"{path}: a link to one of its own parent folders")
    children = sorted(path.iterdir())
    if (saved := saved_files(path)) is not None:
        left_out["not part of a saved dataset"] += len(children) - len(saved)
        yield from saved
        return
    metadata = metadata_in(path)
    for child in children:
        if child.name.startswith("."):
            left_out["hidden"] += 1
        elif child.name in metadata or SPARK_FILES.fullmatch(child.name):
            left_out["metadata"] += 1
        else:
            yield from files_below(child, left_out, (*above, here))


def metadata_in(folder: Path) -> tuple[str, ...]:
    """Names of files in `folder` that describe other files."""
    saved = (
        ("dataset_dict.json",)
        if isinstance(json_object(folder / "dataset_dict.json").get("splits"), list)
        else ()
    )
    return (*HUB_FILES, *saved) if is_hub_snapshot(folder) else saved


def saved_files(folder: Path) -> list[Path] | None:
    """The data files of a `Dataset.save_to_disk` folder in the order of its state.json; None for any other folder."""
    state = json_object(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not (folder / "dataset_info.json").exists():
        return None
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: a saved dataset with a selection of its rows; save it again after flatten_indices()"
        )
    return [folder / str(entry["filename"]) for entry in listed]


def is_hub_snapshot(folder: Path) -> bool:
    """Whether it is a download or clone of a whole repository, or the hub's cache."""
    if (folder / ".cache" / "huggingface").is_dir():
        return True
    if SNAPSHOT.fullmatch(folder.name) and folder.parent.name == "snapshots":
        return True
    attributes = folder / ".gitattributes"
    return attributes.is_file() and b"filter=lfs" in attributes.read_bytes()


def json_object(file: Path) -> dict[str, Any]:
    """Its content; empty if the file does not exist or holds anything else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
