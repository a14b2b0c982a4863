"""`megadyn plan` as a script."""

from megadyn.commands.plan import main, parse_args
from megadyn.errors import run_tool

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    raise SystemExit(run_tool(main))
