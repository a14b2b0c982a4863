"""Measure how fast and how large parts of megadyn are; prints a table, and with --json one object.

    python tools/benchmark.py data [options]        # text to a dataset; `data --help` says more
    python tools/benchmark.py samples [options]     # opening, cutting, blending and reading datasets
    python tools/benchmark.py step [options]        # a training step of every kind of model, against dense and transformers
    python tools/benchmark.py layer [options]       # where the time of each kind of layer goes
    python tools/benchmark.py generate [options]    # prefill and decoding of every kind of model, against transformers
    python tools/benchmark.py checkpoint [options]  # how long saving stalls training; writing, verifying and restoring
    python tools/benchmark.py scaling [options]     # 1, 2 and 4 processes over tensor, pipeline and data
    python tools/benchmark.py soak [options]        # thousands of tiny steps of every kind of routing: does it last?
    python tools/benchmark.py flips [options]       # what a layout computes under recorded routing choices, and under its own

Each has a `--help` of its own, and `--json`.
"""

import argparse
import sys
from importlib import import_module

from megadyn.errors import Parser, run_tool

BENCHMARKS = {
    "data": "megadyn.benchmark.preparation",
    "samples": "megadyn.benchmark.samples",
    "step": "megadyn.benchmark.step",
    "layer": "megadyn.benchmark.layer",
    "generate": "megadyn.benchmark.generate",
    "checkpoint": "megadyn.benchmark.checkpoint",
    "scaling": "megadyn.benchmark.scaling",
    "soak": "megadyn.benchmark.soak",
    "flips": "megadyn.benchmark.flips",
}
"""Module of each, whose `main` takes the options."""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHMARKS)
    args = parser.parse_args(sys.argv[1:2])
    import_module(BENCHMARKS[args.what]).main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
