"""`megadyn benchmark` as a script."""

from megadyn.commands import run_command
from megadyn.commands.benchmark import BENCHMARKS, main

__all__ = ["BENCHMARKS", "main"]

if __name__ == "__main__":
    raise SystemExit(run_command(main))
