"""The remote files that an address refers to: one, those of a folder, or those that match a pattern."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from megadyn.errors import UserError
from megadyn.prepare.folders import HUB_FILES, SPARK_FILES
from megadyn.prepare.remote import (
    WEB,
    RemoteFile,
    described,
    file_system,
    of_each,
    patiently,
    protocol_of,
    shown,
)
from megadyn.progress import waiting


def files_at(address: str, left_out: Counter[str]) -> list[RemoteFile]:
    """The file at `address`; all below it, if it is a folder; or what it matches as a pattern, sorted by name.

    Files that are not part of a corpus are counted in `left_out`, as of local folders. On the web there are no folders, and
    a pattern matches what the page of its folder links to. Raises UserError if there is nothing.
    """

    counted = Counter[str]()

    def listed() -> list[RemoteFile]:
        counted.clear()
        system, path = file_system(address)
        if protocol_of(address) == "hf":
            path = at_commit(system, path)
        if protocol_of(address) in WEB:
            return web_files(system, path)
        return [
            described(system, name, entry)
            for name, entry in sorted(stored_files(system, path, counted).items(), key=by_parts)
        ]

    with waiting(f"listing {shown(address)}"):
        found = patiently(listed, shown(address))
    left_out.update(counted)
    if not found:
        raise UserError(f"{shown(address)}: no such file or folder")
    return found


def by_parts(entry: tuple[str, Any]) -> list[str]:
    """Key of an order that does not mix the files of folders, as of local folders."""
    return entry[0].split("/")


def web_files(system: Any, path: str) -> list[RemoteFile]:
    if not re.search(r"[*\[]", urlsplit(path).path):  # `?` begins a query, and [ ] may hold a host
        return [described(system, path)]
    return of_each(lambda name: described(system, name), sorted(system.glob(path)))


def stored_files(system: Any, path: str, left_out: Counter[str]) -> dict[str, dict[str, Any]]:
    """fsspec's entries of files, by path."""
    matched = system.glob(path, detail=True) if re.search(r"[*?\[]", path) else {path: system.info(path)}
    found: dict[str, dict[str, Any]] = {}
    for name, entry in matched.items():
        if entry["type"] == "directory":
            below = system.find(name, detail=True)
            found |= {file: below[file] for file in corpus_files(system, name, below, left_out)}
        else:
            found[name] = entry
    return found


def corpus_files(system: Any, folder: str, below: Iterable[str], left_out: Counter[str]) -> Iterator[str]:
    """Those of the files below `folder` that are part of a corpus."""
    names = set(below)
    describing = HUB_FILES if is_hub(system) else ()
    for file in names:
        parts = file.removeprefix(folder).strip("/").split("/")
        if {f"{file.rpartition('/')[0]}/{name}" for name in ("state.json", "dataset_info.json")} <= names:
            raise UserError(
                f"{system.unstrip_protocol(folder)}: holds a dataset of save_to_disk; name its files (FOLDER/*.arrow)"
            )
        if any(part.startswith(".") for part in parts):
            left_out["hidden"] += 1
        elif parts[-1] in describing or any(SPARK_FILES.fullmatch(part) for part in parts):
            left_out["metadata"] += 1
        else:
            yield file


def is_hub(system: Any) -> bool:
    return "hf" in (system.protocol if isinstance(system.protocol, tuple | list) else (system.protocol,))


def at_commit(system: Any, path: str) -> str:
    """A path on the Hugging Face hub, at the commit that its revision is now: the same for all processes and until the end."""
    from huggingface_hub import HfApi

    where = system.resolve_path(path)
    if not hasattr(where, "repo_id"):  # a bucket, which has no commits
        return path
    commit = HfApi().repo_info(where.repo_id, revision=where.revision, repo_type=where.repo_type).sha
    kind = "" if where.repo_type == "model" else f"{where.repo_type}s/"
    return f"{kind}{where.repo_id}@{commit}/{where.path_in_repo}"
