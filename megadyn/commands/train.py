"""Train as configured, or resume from the run's newest good checkpoint.

By itself this is one process. With --processes it starts that many on this machine: one per GPU, or one per core
without GPUs. deepspeed, torchrun, mpirun or srun can also start it, as they start `python -m megadyn.pretrain`; several
machines need one of these.

    megadyn train config.yaml training.iterations=20
    megadyn train config.yaml --processes 8 parallel.tensor=2 parallel.pipeline=2
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megadyn.arguments import add_config_arguments, command_parser, positive
from megadyn.config import batch_plan, engine_settings, load_config
from megadyn.errors import Parser, UserError
from megadyn.log import loading

MAIN_JOB = "megadyn.pretrain"
TORCHRUN = "megadyn.launch.torchrun"


def make_parser() -> Parser:
    parser = command_parser("train", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--processes", type=positive, metavar="N", help="start N processes on this machine")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # passed by launchers
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.processes is not None:
        start_processes(args.processes, str(args.config), args.overrides)
    loading("torch and DeepSpeed")
    from megadyn.pretrain import main_of_a_rank  # seconds of imports, which help and mistakes do without

    main_of_a_rank([str(args.config), *args.overrides])


def start_processes(number: int, path: str, overrides: Sequence[str]) -> None:
    """Replaces this process by torchrun with the main job. First raises UserError for what no rank could run, to report
    it once."""
    if "RANK" in os.environ:
        raise UserError(
            "--processes: leave it out if a launcher (deepspeed, torchrun, ...) starts the processes"
        )
    config = load_config(path, overrides)
    engine_settings(config)
    batch_plan(config, number)
    if number > 1:  # torchrun would do the same, but print a warning
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"starting {number} processes", flush=True)  # torchrun takes seconds to do so
    launcher = ["-m", TORCHRUN, "--standalone", "--nproc_per_node", str(number)]
    os.execv(sys.executable, [sys.executable, *launcher, "-m", MAIN_JOB, path, *overrides])
