"""One logger; rank 0 speaks."""

import logging
import os
import sys

log = logging.getLogger("megadyn")


def start_logging() -> None:
    """Plain lines on standard output from rank 0, warnings and errors with their rank from the others."""
    rank = int(os.environ.get("RANK", 0))
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
