"""Errors that are the user's to mend: one sentence, exit status 2, no traceback."""

import argparse
import difflib
import errno
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


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


class Parser(argparse.ArgumentParser):
    """Its errors are the user's too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """" (did you mean 'x'?)" for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def run_tool(main: Callable[[], int | None]) -> int:
    """Exit status of `main`; a `UserError` becomes one line on standard error and status 2, a `RunError` one and status 1.

    So does an `OSError` about a file (no permission, a name too long) or a full disk, with status 2: that is the user's to mend.
    """
    try:
        return main() or 0
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {'' if error.filename is None else f'{error.filename}: '}{error.strerror}", file=sys.stderr)
        return 2
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
