"""Errors that the user can fix: one sentence, exit status 2, no traceback."""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

CLOSED_PIPE = 128 + 13
"""Exit status of a program that was ended by SIGPIPE."""


class UserError(Exception):
    """Invalid input. Its text is the one sentence that the user sees after `error: `."""


class ConfigError(UserError):
    """A key of the configuration, its value, and what it must be."""

    def __init__(self, key: str, got: object, want: str) -> None:
        super().__init__(f"{key} = {got!r}: must be {want}")


class RunError(Exception):
    """The run cannot continue, although its input is valid. Its text is one sentence; exit status 1."""

    is_everywhere = False
    """Whether all ranks raise the same error, so that one may report for all."""


class OutputClosed(Exception):
    """The reader of standard output is gone."""


def one_line(error: object) -> str:
    """Another library's error message as one line, for use in our own messages."""
    return " ".join(str(error).split()).rstrip(".")


def line_lost(error: OSError) -> Exception:
    """The exception for a log line that could not be written to standard output. Not an `OSError`, which would blame a file."""
    return (
        OutputClosed()
        if isinstance(error, BrokenPipeError)
        else UserError(f"standard output: {error.strerror}")
    )


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the most similar word in `known`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextmanager
def some_standard_output() -> Iterator[None]:
    """Makes printing harmless if the tool was started without standard output (`>&-`)."""
    if sys.stdout is not None:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def say_on_rank(error: Exception) -> None:
    """One line on standard error, which names the local rank where there are several."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    print(f"error: {f'[local rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)


@some_standard_output()
def run_tool(main: Callable[[], int | None]) -> int:
    """Runs `main` and returns the exit status. A `UserError` gives one line on standard error and status 2; a
    `RunError` one line and status 1.

    An `OSError` about a file (no permission, name too long) or a full disk also gives one line and status 2, because
    the user can fix it. If the reader of standard output is gone (`| head`), nothing is printed and the status is 141.
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
    """Drops buffered output that cannot be written. Otherwise Python would retry at exit and show a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
