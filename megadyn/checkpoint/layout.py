"""What a checkpoint is on disk, and how one becomes visible.

    checkpoints/
      latest                                  name of the newest, and crc32 of that line; replaced atomically
      iteration-00000100/
        manifest.json                         format, iteration, topology, routing state, size and sha256 of each file
        manifest.sha256                       of manifest.json
        config.yaml                           the run's resolved configuration
        weights-pp00-tp00-dp00.safetensors    fp32 weights under their Hugging Face names
        optimizer-pp00-tp00-dp00.safetensors  NAME/exp_avg and NAME/exp_avg_sq, fp32

A tensor that is cut over tensor ranks has a part in each rank's file, others stand in tensor rank 0's. The
data-parallel ranks of a stage share its tensors out among them, so that all write at once.

A checkpoint is written under a temporary name beside its place, synced to disk and renamed: under its own name
it is complete. A checkpoint is good unless it was saved right after a bad step (the manifest's `loss_rule`), or holds a file
`not-good`, which says why: its model was evaluated at the end of the run and gave NaN.

`latest` decides, as a run that went back leaves higher iterations behind; a reader that finds it missing or damaged takes
the highest iteration, and says so of a damaged one. Its first line is the name alone, for scripts.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megadyn.errors import UserError
from megadyn.kinds.older import newer_manifest
from megadyn.log import log
from megadyn.progress import BYTES, Bar

FORMAT = 2
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints inside its output folder."""
NAME = re.compile(r"iteration-(\d{8})$")
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
CHUNK_BYTES = 2**20
"""Read at once, for a hash."""
WRITING, REPLACED, REMOVING = ".writing-", ".replaced-", ".removing-"
"""Before a checkpoint's name while it is none."""
NOT_GOOD = "not-good"
"""File in a checkpoint that turned out to be worthless; holds the reason."""


def folder_name(iteration: int) -> str:
    return f"iteration-{iteration:08d}"


def iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iteration-"))


def shard_file(kind: str, pp: int, tp: int, dp: int) -> str:
    """kind: `weights` or `optimizer`."""
    return f"{kind}-pp{pp:02d}-tp{tp:02d}-dp{dp:02d}.safetensors"


def complete_checkpoints(root: Path, *, quiet: bool = False) -> list[Path]:
    """Checkpoints under `root`, best to resume from first: `latest`, then those before it, newest first.

    What lies beyond `latest` was left by a run that has since gone back; it is neither used nor removed. `quiet` does not
    warn of a damaged `latest`: whoever looks again will.
    """
    found = [path for path in root.glob("iteration-*") if NAME.match(path.name)] if root.is_dir() else []
    found.sort(key=lambda path: path.name, reverse=True)
    if not (root / "latest").exists():
        return found
    latest, check = read_latest(root / "latest")
    problem = ""
    if latest is None:
        problem = "cannot be read"
    elif check and check != check_of(latest):
        problem = "is damaged (its crc32 is not that of its name)"
    elif latest not in [path.name for path in found]:
        problem = "names no checkpoint there is"
    if latest is None or problem:
        if not quiet:
            log.warning(
                "%s %s: passed over, %s",
                root / "latest",
                problem,
                f"{found[0].name} is the highest iteration" if found else "and there is no checkpoint",
            )
        return found
    return [path for path in found if path.name <= latest]


def reservation(folder: Path) -> str | None:
    """Why a checkpoint does not count as good, although it is whole; None for one that does, or that cannot be read."""
    if reason := condemned(folder):
        return reason
    try:
        rule = read_manifest(folder).get("loss_rule") or {}
    except UserError:  # `damage` tells
        return None
    return "it was saved right after a bad step" if rule.get("last_was_bad") else None


def condemned(folder: Path) -> str | None:
    """What was wrong with the model of a checkpoint when its run ended; None if nothing was."""
    try:
        return (folder / NOT_GOOD).read_text().strip()
    except FileNotFoundError:
        return None


def good_first(folders: list[Path]) -> list[Path]:
    """`folders` in their order, those that do not count as good behind the others."""
    return sorted(folders, key=lambda folder: reservation(folder) is not None)  # a stable sort


def mark_not_good(folder: Path, reason: str) -> None:
    write_file(folder / NOT_GOOD, reason + "\n")


def read_latest(path: Path) -> tuple[str | None, str]:
    """The name that it holds and the name's check, which a file of an earlier version has not; None where it cannot be read."""
    try:
        name, _, check = path.read_bytes().decode(errors="replace").partition("\n")
    except OSError:
        return None, ""
    return name.strip(), check.strip()


def check_of(name: str) -> str:
    return f"crc32 {zlib.crc32(name.encode()):08x}"


def file_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes renames and new names inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, text: str) -> None:
    """`path` holds either what it held before or all of `text`, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync_file(temporary)
    temporary.replace(path)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    write_file(path, json.dumps(manifest, indent=1))
    write_file(folder / DIGEST, file_digest(path)["sha256"] + "\n")


def publish(temporary: Path, final: Path) -> None:
    """Gives a finished checkpoint its name and points `latest` at it."""
    sync_folder(temporary)
    old = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # a run that went back and reached the iteration again
        final.rename(old)
    temporary.rename(final)
    write_file(final.parent / "latest", f"{final.name}\n{check_of(final.name)}\n")
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Removes all but the `keep` newest checkpoints (0 keeps all), the newest good one, and those of iterations that
    `keep_every` divides."""
    complete = complete_checkpoints(root)
    newest_good = next((path for path in complete if reservation(path) is None), None)
    for path in complete[keep:] if keep else []:
        if path != newest_good and not (keep_every and iteration_of(path) % keep_every == 0):
            # a half-removed checkpoint must not look like one
            dying = path.with_name(f"{REMOVING}{path.name}")
            path.rename(dying)
            shutil.rmtree(dying)


def clear_leftovers(root: Path) -> None:
    """Removes what an attempt to write, replace or remove a checkpoint left when the run died."""
    for prefix in (WRITING, REPLACED, REMOVING):
        for path in root.glob(f"{prefix}*"):
            shutil.rmtree(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """With an older DTF's entries converted. Raises UserError unless `folder` holds a checkpoint of this format."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:  # other formats had no digest
            digest = (folder / DIGEST).read_bytes()
            if digest != hashlib.sha256(content).hexdigest().encode() + b"\n":
                raise UserError(f"{path}: damaged (its sha256 is not that of {DIGEST})")
    except OSError as error:
        raise UserError(
            f"{folder}: not a checkpoint ({Path(error.filename or path).name}: {error.strerror})"
        ) from None
    except ValueError:
        raise UserError(f"{path}: damaged: not valid JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of format {FORMAT}")
    if missing := [
        key for key in ("iteration", "consumed_samples", "topology", "model", "files") if key not in manifest
    ]:
        raise UserError(f"{path}: damaged: it has no {missing[0]!r}")
    return newer_manifest(manifest)


def damage(folder: Path, names: list[str]) -> str | None:
    """What is wrong with the named files against the manifest, or None. Raises UserError for a damaged manifest."""
    files = read_manifest(folder)["files"]
    with Bar(f"verifying {folder.name}", sum(files[name]["bytes"] for name in names), BYTES) as bar:
        for name in names:
            path, want = folder / name, files[name]
            try:
                if path.stat().st_size != want["bytes"]:
                    return f"{path}: {path.stat().st_size} bytes, {want['bytes']} expected"
                if sha256_of(path, bar.add) != want["sha256"]:
                    return f"{path}: damaged (its sha256 is not the manifest's)"
            except FileNotFoundError:
                return f"{path}: missing"
            except OSError as error:
                return f"{path}: cannot be read ({error.strerror})"
    return None


def sha256_of(path: Path, read: Callable[[int], None]) -> str:
    """Of a file; `read` is told of its bytes, chunk by chunk."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", 0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            read(size)
    return digest.hexdigest()


def resolve(path: Path) -> Path:
    """A checkpoint's folder from itself, or the newest good one of a `checkpoints/` folder or a run's output folder."""
    if (path / "manifest.json").exists() or NAME.match(path.name):
        return path
    for root in (path, path / CHECKPOINTS):
        if found := complete_checkpoints(root):
            best = good_first(found)[0]
            for folder in found[: found.index(best)]:
                log.warning(
                    "%s passed over: %s; name its folder to use it anyway", folder, reservation(folder)
                )
            return best
    raise UserError(f"{path}: no checkpoint found there" if path.exists() else f"{path}: no such folder")
