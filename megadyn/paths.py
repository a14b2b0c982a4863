"""Paths as people write them: `~` and environment variables mean the same as in a shell."""

import os
import re
from pathlib import Path

from megadyn.errors import UserError

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expanded(text: str, key: str = "") -> str:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` expanded. Every path given by a user goes through this function.

    Args:
        key: what contains the path, for the message.

    Raises:
        UserError: a variable is not set or empty, or a user does not exist. Unexpanded, the text would become a folder
        of that
            name; an empty value would turn `$DATA/x` into `/x`.
    """
    where = f"{key} = {text!r}" if key else repr(text)

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not (content := os.environ.get(name)):
            raise UserError(f"{where}: the environment variable {name} is not set, or is empty")
        return content

    result = (
        os.path.expanduser(VARIABLE.sub(value, text)) if text.startswith("~") else VARIABLE.sub(value, text)
    )
    if text.startswith("~") and result.startswith("~"):
        raise UserError(f"{where}: there is no home folder of {text.partition('/')[0]}")
    return result


def user_path(text: str) -> Path:
    """Argument type of a tool's path."""
    return Path(expanded(text))
