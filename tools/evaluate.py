"""`megadyn evaluate` as a script."""

from megadyn.commands import run_command
from megadyn.commands.evaluate import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    raise SystemExit(run_command(main))
