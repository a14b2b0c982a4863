"""Work that all ranks of a job do for one checkpoint: it succeeds on all of them or fails on all of them."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from megadyn.errors import RunError, UserError
from megadyn.parallel.objects import all_gather


class CheckpointError(RunError):
    """A checkpoint could not be written; earlier ones are intact."""

    is_everywhere = True


def together(action: Callable[[], Any], what: str, group: dist.ProcessGroup | None) -> list[Any]:
    """Runs action() on every rank and returns all results. If it fails on one, raises CheckpointError on all: `what` was
    not written."""
    try:
        outcome: tuple[str | None, Any] = (None, action())
    # A full disk gives SafetensorError, a damaged checkpoint that is read UserError.
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        outcome = (f"{type(error).__name__}: {error}", None)
    outcomes = all_gather(outcome, group)
    failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error]
    if failed:
        raise CheckpointError(f"{what} not written ({failed[0]})")
    return [result for _, result in outcomes]
