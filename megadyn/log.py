"""One logger, used mainly by rank 0."""

import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import TextIO

Raises = Callable[[OSError], Exception]

log = logging.getLogger("megadyn")

MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""Set by Open MPI, MPICH and Intel MPI, and srun; torch's launchers set RANK."""
MPI_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
"""The same of the number among the processes of a machine; torch's launchers set LOCAL_RANK."""


NO_GPU = "Setting accelerator to CPU"
"""How DeepSpeed's remark begins that it found no GPU: a line per process. `launch.join` says it once."""


def without_remarks() -> None:
    """Leaves out what DeepSpeed says of the device when it is imported; called before that."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(NO_GPU))


def loading(what: str) -> None:
    """The first line of a job, from its first process, before imports that take seconds."""
    without_remarks()
    if next((os.environ[name] for name in ("RANK", *MPI_RANKS) if name in os.environ), "0") == "0":
        print(f"loading {what}", flush=True)


class Console(logging.Handler):
    """Prints to what `sys.stdout` or `sys.stderr` is when the line comes: it may have been replaced since the start (by a
    capture, a pager).

    If a line cannot be written, raises `raises(error)` if `raises` is given. Otherwise the logging library reports this
    on standard error, and the program continues.
    """

    def __init__(self, raises: Raises | None, stream: str) -> None:
        super().__init__()
        self._raises, self._stream = raises, stream

    def emit(self, record: logging.LogRecord) -> None:
        stream = getattr(sys, self._stream)
        if stream is None:  # the process was started without it (`2>&-`)
            return
        try:
            # in one piece, among those of other ranks
            print(f"{fitted(self.format(record), stream)}\n", end="", flush=True, file=stream)
        except Exception as error:
            if self._raises and isinstance(error, OSError):
                raise self._raises(error) from error
            self.handleError(record)


def fitted(text: str, stream: TextIO) -> str:
    """`text`, in lines that are broken between words where a terminal is too narrow for them."""
    if not stream.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(
        line
        if len(line) <= columns
        else textwrap.fill(
            line, columns, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        for line in text.split("\n")
    )


def start_logging(raises: Raises | None = None, stream: str = "stdout") -> None:
    """Plain lines from rank 0, warnings and errors with their rank from the others.

    `raises` is for tools, which end if their output cannot be written (`errors.line_lost`); training continues.
    """
    rank = int(os.environ.get("RANK", 0))
    handler = Console(raises, stream)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
