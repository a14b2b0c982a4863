"""`megadyn benchmark` as a script."""

from megadyn.commands.benchmark import BENCHMARKS, main
from megadyn.errors import run_tool

__all__ = ["BENCHMARKS", "main"]

if __name__ == "__main__":
    raise SystemExit(run_tool(main))
