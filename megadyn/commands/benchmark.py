"""Measure speed and memory of parts of megadyn; prints a table, or with --json one object.

    megadyn benchmark data [options]        # text to a dataset; `data --help` says more
    megadyn benchmark samples [options]     # opening, cutting, blending and reading datasets
    megadyn benchmark step [options]        # a training step of every kind of model, against dense and transformers
    megadyn benchmark layer [options]       # where the time of each kind of layer goes
    megadyn benchmark bytes [options]       # bytes and operations of a training step, counted without a GPU
    megadyn benchmark engine [options]      # real runs of the main job: tokens/s, and memory beside the plan
    megadyn benchmark generate [options]    # prefill and decoding of every kind of model, against transformers
    megadyn benchmark checkpoint [options]  # how long saving stalls training; writing, verifying and restoring
    megadyn benchmark scaling [options]     # 1, 2 and 4 processes in tensor, pipeline and data parallelism
    megadyn benchmark soak [options]        # thousands of tiny steps of every kind of routing: does it stay stable?
    megadyn benchmark flips [options]       # a layout's results with recorded routing choices, and with its own
    megadyn benchmark upcycle [options]     # what a dense model loses when it becomes a routed one, and regains when

Each has its own `--help`, and `--json`.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from megadyn.arguments import command_parser
from megadyn.errors import Parser
from megadyn.log import log

BENCHMARKS = {
    "data": "megadyn.benchmark.preparation",
    "samples": "megadyn.benchmark.samples",
    "step": "megadyn.benchmark.step",
    "layer": "megadyn.benchmark.layer",
    "bytes": "megadyn.benchmark.bytes",
    "engine": "megadyn.benchmark.engine",
    "generate": "megadyn.benchmark.generate",
    "checkpoint": "megadyn.benchmark.checkpoint",
    "scaling": "megadyn.benchmark.scaling",
    "soak": "megadyn.benchmark.soak",
    "flips": "megadyn.benchmark.flips",
    "upcycle": "megadyn.benchmark.upcycle",
}
"""Module of each benchmark; its `main` takes the options."""


def make_parser() -> Parser:
    parser = command_parser("benchmark", __doc__)
    parser.add_argument(
        "what", choices=tuple(BENCHMARKS), help="which one; `megadyn benchmark WHAT --help` says more"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of that benchmark")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(words[:1])
    log.info("loading the benchmark")
    # As Ctrl-C does: whatever a benchmark has started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    import_module(BENCHMARKS[args.what]).main(words[1:])
