"""The files of a checkpoint, and how a checkpoint becomes visible.

    checkpoints/
      latest                                  name of the newest checkpoint and crc32 of the name; replaced atomically
      iteration-00000100/
        manifest.json                         format, iteration, topology, routing state, size and sha256 of each file
        manifest.sha256                       of manifest.json
        config.yaml                           the run's resolved configuration
        weights-pp00-tp00-dp00.safetensors    fp32 weights with their Hugging Face names
        optimizer-pp00-tp00-dp00.safetensors  NAME/exp_avg and NAME/exp_avg_sq, or NAME/momentum, fp32

A tensor that is cut over tensor ranks has one part in each rank's file; other tensors are in tensor rank 0's file. The
data-parallel ranks of a stage divide its tensors among them, so that all write at once.

A checkpoint is written under a temporary name in the same folder, synced to disk and renamed. Under its final name it
is complete. A checkpoint is good unless it was saved right after a bad step (the manifest's `loss_rule`) or contains a
file `not-good` with the reason: its model was evaluated at the end of the run and gave NaN.

An average of checkpoints (`averaging.py`) has the same files, but for those of the optimizer.

`latest` decides, not the highest iteration, because a run that went back leaves higher iterations behind. If `latest`
is missing or damaged, readers take the highest iteration; they warn if it is damaged. Its first line is just the name,
for scripts.
"""

import hashlib
import json
import math
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
AVERAGES = "averages"
"""Folder of averages of a run's checkpoints, beside CHECKPOINTS and with the same names inside. No run resumes from them."""
NAME = re.compile(r"iteration-(\d{8})$")
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
CHUNK_BYTES = 2**20
"""Read at once, for a hash."""
WRITING, REPLACED, REMOVING, FETCHING = ".writing-", ".replaced-", ".removing-", ".fetching-"
"""Prefixes of a checkpoint's name while it is being written, replaced, removed or fetched from a mirror."""
NOT_GOOD = "not-good"
"""File in a checkpoint whose model turned out to be bad; contains the reason."""
BEST = "best"
"""File in the run's best checkpoint by a validation loss; contains the set's name and the loss, as JSON."""
HELD = "being-mirrored"
"""Empty file in a checkpoint that is being copied to a mirror, and is not removed meanwhile."""
EVALUATED = "being-evaluated"
"""The same of a checkpoint that is being evaluated on tasks, or waits for that."""


def folder_name(iteration: int) -> str:
    return f"iteration-{iteration:08d}"


def iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iteration-"))


def shard_file(kind: str, pp: int, tp: int, dp: int) -> str:
    """kind: `weights` or `optimizer`."""
    return f"{kind}-pp{pp:02d}-tp{tp:02d}-dp{dp:02d}.safetensors"


def complete_checkpoints(root: Path, *, quiet: bool = False) -> list[Path]:
    """Checkpoints under `root`, the best to resume from first: `latest`, then earlier ones, newest first.

    Checkpoints beyond `latest` come from a run that has since gone back; they are neither used nor removed. `quiet`
    suppresses the warning about a damaged `latest`, for callers that are followed by another look.
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
        problem = "is damaged (its crc32 does not match its name)"
    elif latest not in [path.name for path in found]:
        problem = "names a checkpoint that does not exist"
    if latest is None or problem:
        if not quiet:
            log.warning(
                "%s %s: ignored; %s",
                root / "latest",
                problem,
                f"{found[0].name} is the highest iteration" if found else "there is no checkpoint",
            )
        return found
    return [path for path in found if path.name <= latest]


def reservation(folder: Path) -> str | None:
    """Why a complete checkpoint does not count as good; None if it does, or if it cannot be read."""
    if reason := condemned(folder):
        return reason
    try:
        rule = read_manifest(folder).get("loss_rule") or {}
    except UserError:  # `damage` reports it
        return None
    return "it was saved right after a bad step" if rule.get("last_was_bad") else None


def condemned(folder: Path) -> str | None:
    """What was wrong with the checkpoint's model when its run ended; None if nothing was."""
    try:
        return (folder / NOT_GOOD).read_text().strip()
    except FileNotFoundError:
        return None


def good_first(folders: list[Path]) -> list[Path]:
    """`folders` in their order, but those that do not count as good at the end."""
    return sorted(folders, key=lambda folder: reservation(folder) is not None)  # a stable sort


def mark_not_good(folder: Path, reason: str) -> None:
    write_file(folder / NOT_GOOD, reason + "\n")


def best_of(folder: Path) -> tuple[str, float] | None:
    """The validation set and the loss by which the checkpoint is marked as best; None if it is not. An unreadable mark has
    an infinite loss."""
    try:
        mark = json.loads((folder / BEST).read_bytes())
        return str(mark["validation"]), float(mark["loss"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        return "", math.inf


def mark_best(folder: Path, validation: str, loss: float) -> bool:
    """Marks the newest checkpoint as the run's best by this loss, unless an earlier one has a loss as low on the same set.
    Removes earlier marks, each after the new one exists."""
    marks = {
        path: best_of(path) for path in complete_checkpoints(folder.parent, quiet=True) if path != folder
    }
    earlier = {path: mark for path, mark in marks.items() if mark is not None}
    if not math.isfinite(loss) or any(
        name == validation and lowest <= loss for name, lowest in earlier.values()
    ):
        return False
    write_file(folder / BEST, json.dumps({"validation": validation, "loss": loss}) + "\n")
    for path in earlier:
        (path / BEST).unlink(missing_ok=True)
    return True


def read_latest(path: Path) -> tuple[str | None, str]:
    """(name, checksum of the name). Files of earlier versions have no checksum. The name is None if it cannot be read."""
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
    """Replaces the content of `path` atomically: after a crash it holds either the old text or all of the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync_file(temporary)
    temporary.replace(path)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    write_file(path, json.dumps(manifest, indent=1))
    write_file(folder / DIGEST, file_digest(path)["sha256"] + "\n")


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished checkpoint to its final name and points `latest` at it."""
    sync_folder(temporary)
    old = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # the run went back and has reached this iteration again
        final.rename(old)
    temporary.rename(final)
    write_file(final.parent / "latest", f"{final.name}\n{check_of(final.name)}\n")
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def surplus(
    names: list[str],
    keep: int,
    keep_every: int,
    is_good: Callable[[str], bool],
    is_best: Callable[[str], bool],
) -> list[str]:
    """Those of the checkpoints `names`, newest first, that are not kept: all except the `keep` newest (0 keeps all), the newest
    good one, the one marked as best, and those whose iteration is a multiple of `keep_every`."""
    if not names[keep:] or not keep:
        return []
    newest_good = next((name for name in names if is_good(name)), None)
    return [
        name
        for name in names[keep:]
        if name != newest_good
        and not (keep_every and iteration_of(Path(name)) % keep_every == 0)
        and not is_best(name)
    ]


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Removes the checkpoints that are not kept (`surplus`), but those that something else still reads."""
    names = [path.name for path in complete_checkpoints(root)]
    for name in surplus(
        names,
        keep,
        keep_every,
        lambda name: reservation(root / name) is None,
        lambda name: (root / name / BEST).exists(),
    ):
        if not any((root / name / mark).exists() for mark in (HELD, EVALUATED)):
            # A partly removed checkpoint must not have a checkpoint's name.
            dying = root / f"{REMOVING}{name}"
            (root / name).rename(dying)
            shutil.rmtree(dying)


def release_held(output_dir: Path) -> None:
    """Removes the marks of copies that a killed run was making."""
    for folder in (CHECKPOINTS, AVERAGES):
        for path in (output_dir / folder).glob(f"iteration-*/{HELD}"):
            path.unlink(missing_ok=True)


def clear_leftovers(root: Path) -> None:
    """Removes leftovers of writing, replacing or removing a checkpoint when the run died."""
    for prefix in (WRITING, REPLACED, REMOVING, FETCHING):
        for path in root.glob(f"{prefix}*"):
            shutil.rmtree(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a manifest; entries of older DTF versions are converted. Raises UserError if `folder` has no checkpoint of
    this format."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:  # other formats had no digest
            digest = (folder / DIGEST).read_bytes()
            if digest != hashlib.sha256(content).hexdigest().encode() + b"\n":
                raise UserError(f"{path}: damaged (its sha256 does not match {DIGEST})")
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
        raise UserError(f"{path}: damaged: {missing[0]!r} is missing")
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
    """The checkpoint at `path`, or the newest good one if `path` is a `checkpoints/` folder or a run's output folder."""
    if (path / "manifest.json").exists() or NAME.match(path.name):
        return path
    for root in (path, path / CHECKPOINTS):
        if found := complete_checkpoints(root):
            best = good_first(found)[0]
            for folder in found[: found.index(best)]:
                log.warning("%s skipped: %s; name its folder to use it anyway", folder, reservation(folder))
            return best
    raise UserError(f"{path}: no checkpoint found there" if path.exists() else f"{path}: no such folder")
