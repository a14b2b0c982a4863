"""Errors that are the user's to mend: one sentence, exit status 2, no traceback."""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

CLOSED_PIPE = 128 + 13
"""Exit status of a program that SIGPIPE ended."""


class UserError(Exception):
    """Bad input. Its text is the one sentence the user sees after `error: `."""


class ConfigError(UserError):
    """A key of the configuration, what it holds, and what it must be."""

    def __init__(self, key: str, got: object, want: str) -> None:
        super().__init__(f"{key} = {got!r}: must be {want}")


class RunError(Exception):
    """The run cannot go on, through no fault of its input. Its text is one sentence; exit status 1."""

    is_everywhere = False
    """Raised on all ranks alike, so that one may speak for them."""


class OutputClosed(Exception):
    """The reader of standard output has gone."""


def one_line(error: object) -> str:
    """What another library says, as words inside a sentence of ours."""
    return " ".join(str(error).split()).rstrip(".")


def line_lost(error: OSError) -> Exception:
    """What to raise for a line of the log that standard output did not take: no `OSError`, as none of the work's files failed."""
    return (
        OutputClosed()
        if isinstance(error, BrokenPipeError)
        else UserError(f"standard output: {error.strerror}")
    )


class Parser(argparse.ArgumentParser):
    """Its errors are the user's too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextmanager
def some_standard_output() -> Iterator[None]:
    """A tool may be started without one (`>&-`); what it prints then goes nowhere."""
    if sys.stdout is not None:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@some_standard_output()
def run_tool(main: Callable[[], int | None]) -> int:
    """Exit status of `main`; a `UserError` becomes one line on standard error and status 2, a `RunError` one and status 1.

    So does an `OSError` about a file (no permission, a name too long) or a full disk, with status 2: that is the user's to
    mend. A reader of standard output that has gone (`| head`) is no news, and status 141.
    """
    try:
        try:
            status = main() or 0
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, UserError) else 1
    except (BrokenPipeError, OutputClosed):
        status = CLOSED_PIPE
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: {'' if error.filename is None else f'{error.filename}: '}{error.strerror}",
            file=sys.stderr,
        )
        status = 2
    leave_standard_output()
    return status


def leave_standard_output() -> None:
    """Drops what it will not take: Python would try once more at its end, and show a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
