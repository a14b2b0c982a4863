"""One logger; rank 0 speaks."""

import logging
import os
from collections.abc import Callable

Raises = Callable[[OSError], Exception]

log = logging.getLogger("megadyn")


class StandardOutput(logging.Handler):
    """Prints to what `sys.stdout` is when the line comes: it may have been replaced since the start (by a capture, a pager).

    For a line that cannot be written it raises what `raises` makes of the error, if that is given; else the library
    tells so on standard error, and all goes on.
    """

    def __init__(self, raises: Raises | None) -> None:
        super().__init__()
        self._raises = raises

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(f"{self.format(record)}\n", end="", flush=True)  # in one piece, among those of other ranks
        except Exception as error:
            if self._raises and isinstance(error, OSError):
                raise self._raises(error) from error
            self.handleError(record)


def start_logging(raises: Raises | None = None) -> None:
    """Plain lines on standard output from rank 0, warnings and errors with their rank from the others.

    `raises` is for tools, which end where nobody hears them (`errors.line_lost`); training goes on.
    """
    rank = int(os.environ.get("RANK", 0))
    handler = StandardOutput(raises)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
