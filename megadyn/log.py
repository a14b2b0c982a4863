"""One logger; rank 0 speaks."""

import logging
import os
import sys
from typing import TextIO

log = logging.getLogger("megadyn")


class StandardOutput(logging.StreamHandler):
    """Writes to what `sys.stdout` is when the line comes: it may have been replaced since the start (by a capture, a pager)."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def start_logging() -> None:
    """Plain lines on standard output from rank 0, warnings and errors with their rank from the others."""
    rank = int(os.environ.get("RANK", 0))
    handler = StandardOutput()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
