"""Averages that a run writes beside its checkpoints (`checkpoint.average`), from what it has on disk.

They lie in a folder of their own, with the names and the `latest` of checkpoints, so that nothing that looks for a
checkpoint to resume from, to keep or to remove meets them. All ranks share the work. Uses neither engine nor device, so
it can run in the background of training.
"""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megadyn.checkpoint import layout
from megadyn.checkpoint.averaging import averaged_files, differs, terms_of, write_part, write_rest
from megadyn.checkpoint.together import CheckpointError, together
from megadyn.config import AverageConfig, Config
from megadyn.errors import UserError
from megadyn.log import log


class Average(NamedTuple):
    folder: Path
    size: int
    """Checkpoints in it, or for a moving average 2 if it continues an earlier one and otherwise 1."""
    write_s: float


def write_average(saved: Path, config: Config, group: dist.ProcessGroup | None) -> Average:
    """Writes the average that belongs to the complete checkpoint `saved`. Collective over `group`.

    Raises CheckpointError on every rank if any rank could not write. Its files are then removed.
    """
    began, settings = time.perf_counter(), config.checkpoint.average
    root = saved.parent.with_name(layout.AVERAGES)
    final, temporary = root / saved.name, root / f"{layout.WRITING}{saved.name}"
    first, what = dist.get_rank() == 0, f"{root}: average"

    def prepare() -> list[Path]:
        if not first:
            return []
        layout.clear_leftovers(root)
        temporary.mkdir(parents=True)
        return earlier_for(saved, settings)

    try:
        # Rank 0's view decides: on a network file system other ranks may see an older one.
        folders = [*intact(together(prepare, what, group)[0], what, group), saved]
        terms = terms_of(folders, settings.ema)
        parts = together(
            lambda: write_part(terms, temporary, dist.get_rank(), dist.get_world_size())[0], what, group
        )
        files = {name: digest for part in parts for name, digest in part.items()}

        def finish() -> None:
            if first:
                write_rest(terms, temporary, files, settings.ema)
                layout.publish(temporary, final)
                layout.prune(root, config.checkpoint.keep, config.checkpoint.keep_every)

        together(finish, what, group)
    except CheckpointError:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Average(final, len(folders), time.perf_counter() - began)


def earlier_for(saved: Path, settings: AverageConfig) -> list[Path]:
    """What goes into the average beside `saved`, from the oldest to the newest: good checkpoints, or for a moving average the
    one before. They must be of the same model, and from after the run last went to another checkpoint, because one
    saved before may not lie on the way to `saved`."""
    if settings.last is None:
        found, count = layout.complete_checkpoints(saved.parent.with_name(layout.AVERAGES), quiet=True), 1
    else:
        found, count = layout.complete_checkpoints(saved.parent, quiet=True), settings.last - 1
    fork = layout.read_manifest(saved).get("forked_from")
    kept: list[Path] = []
    for folder in found:
        if folder.name >= saved.name or len(kept) == count:
            continue
        try:
            manifest = layout.read_manifest(folder)
            belongs = manifest.get("forked_from") == fork and not differs(folder, saved)
        except UserError as error:
            log.warning("left out of the average: %s", error)
            continue
        if settings.ema is not None and manifest["averaged"]["decay"] is None:
            continue  # of the time when the run wrote averages of the last ones
        if belongs and layout.reservation(folder) is None:
            kept.append(folder)
    return kept[::-1]


def intact(folders: list[Path], what: str, group: dist.ProcessGroup | None) -> list[Path]:
    """`folders` but those with a damaged file, which is logged. The files are divided among the ranks. Collective."""

    def damages() -> dict[Path, str]:
        rank, world = dist.get_rank(), dist.get_world_size()
        found = {folder: layout.damage(folder, averaged_files(folder)[rank::world]) for folder in folders}
        return {folder: problem for folder, problem in found.items() if problem}

    bad = {folder: problem for part in together(damages, what, group) for folder, problem in part.items()}
    for problem in bad.values():
        log.warning("left out of the average: %s", problem)
    return [folder for folder in folders if folder not in bad]
