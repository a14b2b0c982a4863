"""Chooses the checkpoint that a run starts or resumes from."""

from pathlib import Path
from typing import Any

from megadyn.checkpoint import layout
from megadyn.checkpoint.save_load import newest_good, verify
from megadyn.config import CheckpointConfig
from megadyn.errors import UserError


def starting_point(settings: CheckpointConfig, own: Path | None) -> Path | None:
    """The checkpoint to start from; None if the run starts without one.

    Args:
        own: the best of the run's own checkpoints, if there is one that it may resume from.

    `fork_from` applies to the start of a run: a run with checkpoints of its own resumes from those. If `fork_from`
    names one of the run's own checkpoints or averages, the run goes back to it, unless the newest one has already
    continued from there.

    Raises:
        UserError: `fork_from` is needed, but there is no checkpoint.
    """
    if settings.fork_from is None:
        return own
    fork = Path(settings.fork_from)
    if own is None:
        return layout.resolve(fork)
    beside = own.resolve().parent
    is_own = fork.resolve().parent in (beside, beside.with_name(layout.AVERAGES))
    if is_own and fork.resolve() != own.resolve() and lineage(own) != str(fork.resolve()):
        return layout.resolve(fork)
    return own


def find_start(settings: CheckpointConfig, root: Path) -> Path | None:
    """The checkpoint to start from, verified; `root` holds the run's own. Collective.

    Raises:
        UserError: as in `starting_point`; also if the fork is damaged, or if own checkpoints exist and none is intact.
    """
    own = newest_good(root) if settings.resume == "auto" else None
    found = starting_point(settings, own)
    if found is not None and found != own and (problem := verify(found)):
        raise UserError(problem)
    return found


def lineage(checkpoint: Path) -> str | None:
    """The checkpoint that the run which saved `checkpoint` was forked from."""
    try:
        found = layout.read_manifest(checkpoint).get("forked_from")
    except UserError:  # verification reports it
        return None
    return found if isinstance(found, str) else None


def likely_start(settings: CheckpointConfig, root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run will most likely start from, and its manifest. Runs before the ranks meet and reads no
    tensors. None if there is no checkpoint or its manifest cannot be read.

    Raises:
        UserError: as in `starting_point`; also if the fork is not a checkpoint.
    """
    complete = (
        layout.good_first(layout.complete_checkpoints(root, quiet=True)) if settings.resume == "auto" else []
    )
    own = complete[0] if complete else None
    found = starting_point(settings, own)
    if found is None:
        return None
    try:
        return found, layout.read_manifest(found)
    except UserError:
        if found == own:
            return None  # the run will choose another one
        raise
