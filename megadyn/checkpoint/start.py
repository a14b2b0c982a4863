"""Which checkpoint a run begins at, or goes on from."""

from pathlib import Path
from typing import Any

from megadyn.checkpoint import layout
from megadyn.checkpoint.save_load import newest_good, verify
from megadyn.config import CheckpointConfig
from megadyn.errors import UserError


def starting_point(settings: CheckpointConfig, own: Path | None) -> Path | None:
    """The checkpoint to start from; None for a run that begins without one.

    Args:
        own: the run's best checkpoint of its own, if it has one and may go on from it.

    `fork_from` says where a run begins, so one that has checkpoints of its own goes on from these. If it names one of
    the run's own, the run goes back to it, unless the newest one has already gone on from there.

    Raises:
        UserError: `fork_from` is needed, and there is no checkpoint.
    """
    if settings.fork_from is None:
        return own
    fork = Path(settings.fork_from)
    if own is None:
        return layout.resolve(fork)
    is_own = fork.resolve().parent == own.resolve().parent
    if is_own and fork.resolve() != own.resolve() and lineage(own) != str(fork.resolve()):
        return layout.resolve(fork)
    return own


def find_start(settings: CheckpointConfig, root: Path) -> Path | None:
    """The checkpoint to start from, verified; `root` holds the run's own. Collective.

    Raises:
        UserError: see `starting_point`; also a damaged fork, or own checkpoints none of which is whole.
    """
    own = newest_good(root) if settings.resume == "auto" else None
    found = starting_point(settings, own)
    if found is not None and found != own and (problem := verify(found)):
        raise UserError(problem)
    return found


def lineage(checkpoint: Path) -> str | None:
    """Where the run forked from that saved a checkpoint."""
    try:
        found = layout.read_manifest(checkpoint).get("forked_from")
    except UserError:  # verification tells
        return None
    return found if isinstance(found, str) else None


def likely_start(settings: CheckpointConfig, root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint under `root`, or forked from, that a run will most likely start from, and its manifest: before the
    ranks meet, and without reading its tensors. None where there is none, or its manifest cannot be read.

    Raises:
        UserError: see `starting_point`; also a fork that is no checkpoint.
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
            return None  # another one will be taken
        raise
