"""One logger, used mainly by rank 0."""

import logging
import os
from collections.abc import Callable

Raises = Callable[[OSError], Exception]

log = logging.getLogger("megadyn")


class StandardOutput(logging.Handler):
    """Prints to the current `sys.stdout`, which may have been replaced since the start (by a capture or a pager).

    If a line cannot be written, raises `raises(error)` if `raises` is given. Otherwise the logging library reports this
    on standard error, and the program continues.
    """

    def __init__(self, raises: Raises | None) -> None:
        super().__init__()
        self._raises = raises

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # One write, so that lines of ranks do not mix.
            print(f"{self.format(record)}\n", end="", flush=True)
        except Exception as error:
            if self._raises and isinstance(error, OSError):
                raise self._raises(error) from error
            self.handleError(record)


def start_logging(raises: Raises | None = None) -> None:
    """Rank 0 logs plain lines to standard output; other ranks log warnings and errors, with their rank.

    `raises` is for tools, which end if their output cannot be written (`errors.line_lost`); training continues.
    """
    rank = int(os.environ.get("RANK", 0))
    handler = StandardOutput(raises)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
