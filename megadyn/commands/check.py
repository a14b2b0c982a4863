"""Check whether a run can start: its configuration, its layout on a number of processes, the hosts of a hostfile.

    megadyn check examples/dtf_3b/config.yaml --hostfile hosts --ssh
    megadyn check examples/dtf_3b/config.yaml --processes 64

The scripts in examples/launch/ run this first, so that a mistake gives one line, not one per rank.
"""

import argparse
import json
from collections.abc import Sequence

from megadyn.arguments import add_config_arguments, command_parser, positive
from megadyn.config import BatchPlan, Config, batch_plan, engine_settings, load_config, named, phase_configs
from megadyn.errors import Parser, UserError
from megadyn.launch.hosts import check_ssh, read_hostfile
from megadyn.log import log
from megadyn.paths import user_path
from megadyn.prepare.remote import file_system
from megadyn.training.task_process import refuse_unknown, refuse_without_package


def make_parser() -> Parser:
    parser = command_parser("check", __doc__)
    add_config_arguments(parser)
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--processes", type=positive, metavar="N", help="total number on all hosts")
    number.add_argument(
        "--hostfile", type=user_path, metavar="FILE", help="one host per line: `name slots=8`"
    )
    parser.add_argument(
        "--ssh", action="store_true", help="check that pdsh and ssh reach the hosts of --hostfile"
    )
    parser.add_argument(
        "--data", action="store_true", help="open tokenizer and datasets, those of every phase"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the layout as one JSON object in the last line"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    config = load_config(args.config, args.overrides)
    zero_stage = engine_settings(config)["zero_optimization"]["stage"]
    hosts = read_hostfile(args.hostfile) if args.hostfile else []
    processes = args.processes or sum(host.slots for host in hosts) or None
    plans = plans_of(config, processes) if processes else []
    if config.checkpoint.mirror:
        file_system(config.checkpoint.mirror)  # refuses an unknown protocol, and one whose package is missing
    refuse_without_package(config.training.tasks)
    if config.training.tasks.names:
        log.info("asking lm_eval for the tasks")
        refuse_unknown(config.training.tasks, device="cpu")  # here, often a login node, the GPUs are not
    if args.data:
        check_data(config)
    if args.ssh:
        if not hosts:
            raise UserError("--ssh: needs --hostfile, whose hosts it is to reach")
        log.info("asking %d hosts over ssh", len(hosts))
        check_ssh(hosts)
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    text = f"{args.config}: ZeRO-{zero_stage}, tensor {tensor} x pipeline {pipeline}"
    if plans:
        on = f" of {len(hosts)} host{'s'[: len(hosts) - 1]}" if hosts else ""
        text += f" x data {plans[0][1].data_parallel} on {processes:,} processes{on}, " + "; ".join(
            f"{f'{one.phase.name}: ' if one.phase else ''}{plan.micro_batches} micro-batches of {plan.micro_batch} each"
            for one, plan in plans
        )
    print(text)
    if args.json:
        print(
            json.dumps(
                {
                    "processes": processes,
                    "hosts": [host.name for host in hosts],
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "data": plans[0][1].data_parallel if plans else None,
                    "zero_stage": zero_stage,
                }
            )
        )
    return 0


def plans_of(config: Config, processes: int) -> list[tuple[Config, BatchPlan]]:
    """How the run, or each of its phases, divides its steps."""
    found = []
    for one in phase_configs(config):
        with named(one):
            found.append((one, batch_plan(one, processes)))
    return found


def check_data(config: Config) -> None:
    """Opens and checks what the run, or each of its phases, trains and evaluates on."""
    log.info("loading torch, to open the data")
    from megadyn.training.phases import open_part  # seconds of imports: only where they are needed
    from megadyn.training.streams import Streams

    streams = Streams()
    for one in phase_configs(config):
        with named(one):
            open_part(one, None, streams)
