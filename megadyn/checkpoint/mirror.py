"""A copy of a run's checkpoints at an address (`checkpoint.mirror`): kept equal to the run's folder, and resumed from.

    ADDRESS/
      run.json                            whose checkpoints these are; OUTPUT_DIR/mirror.json holds the same
      checkpoints/latest                  as in the run's folder
      checkpoints/iteration-00000100/     as there; manifest.json is written last and removed first
      averages/                           the same of averages
      exports/NAME/                       an export, with mirror.json, written last: size and sha256 of each file

Without its manifest a checkpoint is not one, so a copy that was cut off is never taken for whole. Every file is read back
and its sha256 compared with the manifest's before the manifest is written. What an interrupted copy has finished is not copied
again. One process uses it.
"""

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from megadyn.checkpoint import layout
from megadyn.checkpoint.layout import BEST, DIGEST, HELD, MANIFEST, NOT_GOOD
from megadyn.checkpoint.store import Store, in_parallel
from megadyn.config import CheckpointConfig
from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.log import log

FOLDERS = (layout.CHECKPOINTS, layout.AVERAGES)
OWNER, OWNED = "run.json", "mirror.json"
"""The file that names the run, at the address and in the run's folder."""
EXPORTS, EXPORTED = "exports", "mirror.json"
REPLACING_LOOKS, REPLACING_S = 10, 0.1
COPY_ATTEMPTS = 2
"""Of a file that arrives with other bytes."""


class There(NamedTuple):
    """What lies at the address in one of FOLDERS."""

    names: list[str]
    """Checkpoints with a manifest that count, newest first: none beyond `latest`."""
    files: dict[str, dict[str, int]]
    """Sizes by checkpoint and file name, of incomplete checkpoints too."""
    latest: bytes | None


class Mirror:
    def __init__(
        self, settings: CheckpointConfig, output_dir: Path, moved: Callable[[], None] = lambda: None
    ) -> None:
        """Raises UserError for an address whose protocol is unknown or lacks its package."""
        assert settings.mirror is not None
        self.settings, self.output_dir = settings, output_dir
        self.store = Store(settings.mirror, moved)
        self._whole: dict[str, str] = {}  # digests of manifests by folder/name, verified by this process
        self._marks: dict[str, bytes | None] = {}  # contents of marks that this process has written or read
        self._good: dict[str, bool] = {}  # whether a checkpoint that is only there counts as good

    # ---- at the start ----------------------------------------------------------------------------

    def claim(self) -> None:
        """Makes the address this run's, which shows that it can be written and read. Raises UserError if it is another's."""
        own, here = self.output_dir / OWNED, self.store.here
        if here is not None and here.resolve().is_relative_to(self.output_dir.resolve()):
            raise UserError(
                f"{self.store} is in output_dir = {str(self.output_dir)!r}: give the mirror another place"
            )
        has_checkpoints = bool(layout.complete_checkpoints(self.output_dir / layout.CHECKPOINTS, quiet=True))
        with os_errors_named(own):
            known, there = own.read_bytes() if own.exists() else None, self.store.read(OWNER)
            if there is not None and there != known and (has_checkpoints or known is not None):
                raise UserError(
                    f"{self.store} is the mirror of another run than {self.output_dir}: give each an address of its own"
                )
            if self.settings.resume == "never" and self._there(layout.CHECKPOINTS).names:
                raise UserError(
                    f"{self.store} holds checkpoints, but checkpoint.resume is never: set checkpoint.resume=auto, or "
                    "another checkpoint.mirror"
                )
            content = there or known or json.dumps({"run": secrets.token_hex(16)}).encode()
            self.output_dir.mkdir(parents=True, exist_ok=True)
            layout.write_file(own, content.decode())
        self.store.write(OWNER, content)

    def restore(self) -> None:
        """Fetches the newest good checkpoint if the run's folder has none, and what averages and marks of later ones need.

        Raises UserError if there are checkpoints at the address, and none of them is intact.
        """
        root = self.output_dir / layout.CHECKPOINTS
        if self.settings.resume == "never":
            return
        there = self._there(layout.CHECKPOINTS)
        if found := layout.complete_checkpoints(root, quiet=True):
            if there.names and there.names[0] > found[0].name:
                log.warning(
                    "%s has %s, but %s goes on from %s: it will replace what is later there",
                    self.store,
                    there.names[0],
                    self.output_dir,
                    found[0].name,
                )
            return
        by_quality = sorted(there.names, key=lambda name: not self._is_good(layout.CHECKPOINTS, name, there))
        start = next((name for name in by_quality if self._fetch(layout.CHECKPOINTS, name, there)), None)
        if start is None:
            if there.names:
                raise UserError(f"{self.store}: no checkpoint there is intact; none was fetched")
            log.info("%s has no checkpoint yet: a new run", self.store)
            return
        for name in there.names[: there.names.index(start)]:
            if not self._is_good(layout.CHECKPOINTS, name, there):
                log.warning("%s/%s skipped: it does not count as good", self.store, name)
        layout.write_file(root / "latest", f"{start}\n{layout.check_of(start)}\n")
        earlier = [name for name in by_quality if name < start]
        wanted = earlier[: (self.settings.average.last or 1) - 1]
        wanted += [name for name in earlier if BEST in there.files[name] and name not in wanted]
        for name in wanted:
            self._fetch(layout.CHECKPOINTS, name, there)
        averages = self._there(layout.AVERAGES)
        if self.settings.average.ema is not None and start in averages.names:
            self._fetch(layout.AVERAGES, start, averages)

    def _fetch(self, folder: str, name: str, there: There) -> bool:
        """Copies a checkpoint into the run's folder; False, with a warning, if it is damaged there. Files that an interrupted
        start has fetched are not fetched again."""
        root = self.output_dir / folder
        temporary, source = root / f"{layout.FETCHING}{name}", f"{folder}/{name}"
        log.info("fetching %s/%s", self.store, source)
        with os_errors_named(temporary):
            temporary.mkdir(parents=True, exist_ok=True)
            for small in (MANIFEST, DIGEST, *({NOT_GOOD, BEST} & set(there.files[name]))):
                (temporary / small).write_bytes(self.store.read(f"{source}/{small}") or b"")
            try:
                files = layout.read_manifest(temporary)["files"]
            except UserError as error:
                log.warning("%s/%s: skipped: %s", self.store, source, error)
                return False

            def get(file: str) -> str | None:
                path, want = temporary / file, files[file]
                if path.exists() and layout.file_digest(path) == want:
                    return None
                if there.files[name].get(file) != want["bytes"]:
                    return f"{file} is missing, or has another size"
                return (
                    None
                    if self.store.get(f"{source}/{file}", path) == want["sha256"]
                    else f"{file} is damaged"
                )

            problem = next(filter(None, in_parallel(get, sorted(files))), None)
            if problem:
                log.warning("%s/%s: skipped: %s", self.store, source, problem)
                return False
            layout.sync_folder(temporary)
            temporary.rename(root / name)
            layout.sync_folder(root)
        return True

    # ---- while the run goes on -------------------------------------------------------------------

    def sync(self) -> None:
        """Makes what is at the address equal to the run's folder: newest checkpoints first, then marks, then retention."""
        for folder in FOLDERS:
            while self._copied_one(folder):
                continue

    def behind(self) -> list[str]:
        """Checkpoints and averages of the run, as `checkpoints/NAME`, that are not known to be copied."""
        found = [path for folder in FOLDERS for path in self._local(folder)]
        return [key_of(path) for path in found if self._whole.get(key_of(path)) != digest_of(path)]

    def _copied_one(self, folder: str) -> bool:
        """Copies the newest checkpoint that lacks there, if one does; otherwise brings the rest up to date."""
        local = self._local(folder)
        if not local:
            return False
        there = self._there(folder)
        lacking = [path for path in local if not self._is_whole(path, there)]
        whole = next((path for path in local if path not in lacking), None)
        if whole is not None:
            self._point_at(folder, whole.name, there)
        if lacking:
            self._copy(lacking[0], there.files.get(lacking[0].name, {}))
            return True
        self._copy_marks(folder, there)
        self._prune(folder, self._there(folder))
        return False

    def _local(self, folder: str) -> list[Path]:
        """The run's checkpoints that are kept, newest first."""
        root = self.output_dir / folder
        for _ in range(REPLACING_LOOKS):  # one that replaces another is missing for a moment
            name = layout.read_latest(root / "latest")[0]
            if name is None or (root / name).exists():
                break
            time.sleep(REPLACING_S)
        found = layout.complete_checkpoints(root, quiet=True)
        return [
            path
            for path in found
            if path.name not in self._surplus([path.name for path in found], folder, {})
        ]

    def _there(self, folder: str) -> There:
        files: dict[str, dict[str, int]] = {}
        for name, size in self.store.sizes(folder).items():
            checkpoint, _, file = name.removeprefix(f"{folder}/").partition("/")
            if layout.NAME.match(checkpoint) and file:
                files.setdefault(checkpoint, {})[file] = size
        latest = self.store.read(f"{folder}/latest")
        whole = sorted((name for name, inside in files.items() if MANIFEST in inside), reverse=True)
        name, _, check = (latest or b"").decode(errors="replace").strip().partition("\n")
        if check == layout.check_of(name):  # also if it is being replaced, and is none just now
            whole = [other for other in whole if other <= name] or whole
        return There(whole, files, latest)

    def _is_whole(self, path: Path, there: There) -> bool:
        """Whether this very checkpoint is there."""
        key, digest = key_of(path), digest_of(path)
        if MANIFEST not in there.files.get(path.name, {}):
            self._whole.pop(key, None)
            return digest == ""  # removed here meanwhile
        if self._whole.get(key) != digest and (self.store.read(f"{key}/{DIGEST}") or b"").decode() == digest:
            self._whole[key] = digest
        return self._whole.get(key) == digest

    def _copy(self, path: Path, found: dict[str, int]) -> None:
        """Copies one checkpoint. If it is removed or replaced meanwhile, gives up."""
        key, digest = key_of(path), digest_of(path)
        try:
            (path / HELD).touch()
            if MANIFEST in found:  # of another checkpoint of that iteration
                self.store.remove([f"{key}/{MANIFEST}"])
            files = layout.read_manifest(path)["files"]
            in_parallel(lambda name: self._copy_file(path / name, key, files[name], found), sorted(files))
            for name in (DIGEST, MANIFEST):
                self.store.write(f"{key}/{name}", (path / name).read_bytes())
            self._whole[key] = digest
            log.info("copied %s to %s", path, self.store)
        except (UserError, OSError):
            if digest_of(path) == digest:
                raise
        finally:
            with suppress(OSError):
                (path / HELD).unlink(missing_ok=True)

    def _copy_file(self, path: Path, key: str, want: dict[str, Any], found: dict[str, int]) -> None:
        name = f"{key}/{path.name}"
        if found.get(path.name) == want["bytes"] and self.store.sha256(name) == want["sha256"]:
            return  # by a copy that was cut off
        for _ in range(COPY_ATTEMPTS):
            self.store.put(path, name)
            if self.store.sha256(name) == want["sha256"]:
                return
        raise UserError(f"{self.store}/{name}: its sha256 is not that of the manifest in {path.parent}")

    def _point_at(self, folder: str, name: str, there: There) -> None:
        content = f"{name}\n{layout.check_of(name)}\n".encode()
        if there.latest != content:
            self.store.write(f"{folder}/latest", content)

    def _copy_marks(self, folder: str, there: There) -> None:
        """The marks of good and best; new ones before old ones are removed."""
        gone, has_best = [], False
        for name, files in there.files.items():
            path = self.output_dir / folder / name
            has_best |= (path / BEST).exists()
            for mark in (NOT_GOOD, BEST) if path.exists() and MANIFEST in files else ():
                key = f"{folder}/{name}/{mark}"
                try:
                    content = (path / mark).read_bytes()
                except FileNotFoundError:
                    gone += [key] if mark in files else []
                    continue
                if mark not in files or self._mark(key) != content:
                    self.store.write(key, content)
                    self._marks[key] = content
        if has_best:  # of a checkpoint that the run has removed meanwhile
            gone += [
                f"{folder}/{name}/{BEST}"
                for name, files in there.files.items()
                if BEST in files and not (self.output_dir / folder / name).exists()
            ]
        self.store.remove(gone)
        for key in gone:
            self._marks.pop(key, None)

    def _mark(self, key: str) -> bytes | None:
        if key not in self._marks:
            self._marks[key] = self.store.read(key)
        return self._marks[key]

    def _prune(self, folder: str, there: There) -> None:
        """Removes what is not kept, and what copies that were cut off have left."""
        gone = self._surplus(there.names, folder, there.files)
        partial = [name for name, files in there.files.items() if MANIFEST not in files]
        for name in (*gone, *partial):
            names = sorted(
                there.files[name], key=lambda file: file != MANIFEST
            )  # first, so that it is no checkpoint
            self.store.remove([f"{folder}/{name}/{file}" for file in names])
            self._whole.pop(f"{folder}/{name}", None)
            log.info(
                "removed %s/%s/%s%s",
                self.store,
                folder,
                name,
                "" if name in gone else ", which was incomplete",
            )

    def _surplus(self, names: list[str], folder: str, files: dict[str, dict[str, int]]) -> list[str]:
        root, there = self.output_dir / folder, There(names, files, None)
        return layout.surplus(
            names,
            self.settings.keep,
            self.settings.keep_every,
            lambda name: self._is_good(folder, name, there),
            lambda name: BEST in files.get(name, {}) or (root / name / BEST).exists(),
        )

    def _is_good(self, folder: str, name: str, there: There) -> bool:
        """Of a checkpoint of the run, or of one that is only at the address."""
        here = self.output_dir / folder / name
        if here.exists():
            return layout.reservation(here) is None
        if NOT_GOOD in there.files.get(name, {}):
            return False
        key = f"{folder}/{name}"
        if key not in self._good:
            try:
                rule = json.loads(self.store.read(f"{key}/{MANIFEST}") or b"").get("loss_rule") or {}
                self._good[key] = not rule.get("last_was_bad")
            except (ValueError, AttributeError):  # damaged, which is found when it is fetched
                self._good[key] = False
        return self._good[key]


def copy_export(export: Path, address: str) -> str:
    """Copies an export to `address`, verified; returns where it lies there. It replaces one of that name."""
    store, key = Store(address), f"{EXPORTS}/{export.absolute().name}"
    found = store.sizes(key)
    store.remove([name for name in found if name == f"{key}/{EXPORTED}"])
    files = {
        str(path.relative_to(export)): layout.file_digest(path)
        for path in export.rglob("*")
        if path.is_file()
    }

    def copy(name: str) -> None:
        store.put(export / name, f"{key}/{name}")
        if store.sha256(f"{key}/{name}") != files[name]["sha256"]:
            raise UserError(f"{store}/{key}/{name}: its sha256 is not that of {export / name}")

    in_parallel(copy, sorted(files))
    store.remove([name for name in found if name.removeprefix(f"{key}/") not in files])
    store.write(f"{key}/{EXPORTED}", json.dumps({"files": files}, indent=1).encode())
    return f"{store}/{key}"


def key_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def digest_of(path: Path) -> str:
    """Of a checkpoint's manifest; empty if there is no such checkpoint (any more)."""
    try:
        return (path / DIGEST).read_text()
    except OSError:
        return ""
