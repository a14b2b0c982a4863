"""List ways to distribute a run over GPUs, and the predicted cost of each layout, without running it.

    megadyn plan examples/dtf_7b/config.yaml --gpus 64 --gpu-memory 80
    megadyn plan examples/dtf_7b/config.yaml --gpus 1024 --gpu-memory 80 --rank 0 511 1023

With --rank, builds the model parts of these ranks without a device, under the configuration's own layout, checks them
against the whole model, and predicts their memory. Memory predictions are tested against real runs; times rest on the
printed assumptions. Of a run in phases, layouts and ranks are those of the phase that needs most memory.
"""

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from megadyn.arguments import above_zero, add_config_arguments, command_parser, positive
from megadyn.config import Config, batch_plan, load_config, named, phase_configs
from megadyn.errors import Parser, UserError
from megadyn.log import log, without_remarks
from megadyn.planning.flops import training_flops
from megadyn.planning.layouts import GIB, Layout, Machine, Refusal, layouts
from megadyn.planning.parameters import total_parameters
from megadyn.planning.phases import largest, phase_plans, phase_table, refusal
from megadyn.progress import each

ASSUMED = {
    "tflops": "TFLOP/s that a GPU achieves in matrix products",
    "node_gpus": "GPUs per node",
    "node_gbytes": "GB/s that a GPU sends within a node",
    "network_gbytes": "GB/s that a GPU sends to other nodes",
    "link_gbytes": "GB/s between a GPU and its node's memory, for offloading",
    "host_gbytes": "GB/s of a node's memory when its processors run an offloaded optimizer",
    "reserve_gib": "GiB of each GPU for CUDA, NCCL and fragmentation",
}
"""Fields of `Machine`; each is an option."""


def make_parser() -> Parser:
    parser = command_parser("plan", __doc__)
    add_config_arguments(parser, "training.sequence_length=8192")
    parser.add_argument("--gpus", type=positive, required=True, metavar="N")
    parser.add_argument("--gpu-memory", type=above_zero, required=True, metavar="GIB", help="of one GPU")
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[], metavar="R", help="build and check these ranks' parts"
    )
    parser.add_argument(
        "--top", type=positive, default=15, metavar="N", help="how many layouts to print (default: 15)"
    )
    for f in fields(Machine):
        if f.name in ASSUMED:
            option = "--gpu-tflops" if f.name == "tflops" else f"--{f.name.replace('_', '-')}"
            parser.add_argument(
                option,
                dest=f.name,
                default=f.default,
                metavar="N",
                type=positive if f.name == "node_gpus" else above_zero,
                help=f"assumed: {ASSUMED[f.name]} (default: {f.default:g})",
            )
    parser.add_argument(
        "--json", action="store_true", help="print all layouts, or ranks, as one JSON list in the last line"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    config = load_config(args.config, args.overrides)
    machine = Machine(args.gpus, args.gpu_memory, **{name: getattr(args, name) for name in ASSUMED})
    if machine.reserve_gib >= machine.memory_gib:
        raise UserError(
            f"--reserve-gib {machine.reserve_gib:g} leaves nothing of --gpu-memory {machine.memory_gib:g}"
        )
    records = (
        check_ranks(config, machine, args.rank) if args.rank else list_layouts(config, machine, args.top)
    )
    if args.json:
        print(json.dumps(records))
    return 0


def check_ranks(config: Config, machine: Machine, ranks: Sequence[int]) -> list[dict[str, object]]:
    log.info("loading torch and DeepSpeed")
    without_remarks()
    from megadyn.engine.dry_run import dry_run  # seconds of imports: only where modules are built

    records: list[dict[str, object]] = []
    phases = phase_configs(config)
    for phase in phases if config.is_in_parts else ():
        with named(phase):
            batch_plan(phase, machine.gpus)
    config = largest(phases)
    for rank in each(ranks, "building ranks", len(ranks)):
        found = dry_run(config, machine, rank)
        print(found.text())
        records.append(found.record())
    return records


def list_layouts(config: Config, machine: Machine, top: int) -> list[dict[str, object]]:
    log.info("planning layouts over %d GPUs", machine.gpus)
    phases = phase_configs(config)
    config = largest(phases)
    found, refused = layouts(config, machine)
    print(headline(config, machine))
    if config.phase:
        print("\n" + phase_table(phase_plans(phases, rate_of)))
        print(f"the layouts are those of {config.phase.name}, whose samples take most memory")
        impossible = {id(layout): found_why for layout in found if (found_why := refusal(layout, phases))}
        refused += dict.fromkeys(impossible.values())
        found = [layout for layout in found if id(layout) not in impossible]
    fitting = [layout for layout in found if layout.fits]
    if fitting:
        print(
            f"\n{len(fitting)} layouts fit; the fastest {min(top, len(fitting))}, by predicted step time:\n"
        )
        print(table(fitting[:top]))
    else:
        print(f"\nno layout fits into {machine.memory_gib - machine.reserve_gib:g} GiB")
    if rest := [layout for layout in found if not layout.fits]:
        print(
            f"\n{len(rest)} need more than {machine.memory_gib - machine.reserve_gib:g} GiB; the smallest:\n"
        )
        print(table(sorted(rest, key=lambda layout: layout.memory.total)[:3]))
    if refused:
        print(f"\n{len(refused)} are not possible:\n")
        print(reasons(refused))
    return [layout.record() for layout in found] + [refusal.record() for refusal in refused]


def headline(config: Config, machine: Machine) -> str:
    model, length = config.model, config.training.sequence_length
    flops = training_flops(model, length) / length
    return "\n".join(
        [
            f"{model.routing.describe()}: {total_parameters(model) / 1e9:.2f}G parameters, {flops / 1e9:.2f} GFLOP per token",
            f"{machine.gpus:,} GPUs of {machine.memory_gib:g} GiB, {config.precision}, "
            f"steps of {config.training.global_batch_size:,} x {length:,} tokens",
            "assumed, not measured:",
            *(f"  {getattr(machine, name):>5g}  {text}" for name, text in ASSUMED.items()),
            "  communication between data-parallel ranks overlaps with computation if the",
            "  DeepSpeed settings have overlap_comm, and otherwise comes after the passes",
            *(
                ["  memory and times of uncompiled layers: training.compile is not planned"]
                * config.training.compile
            ),
            *(
                [
                    "  memory of masks for the sliding window, which sdpa and routed layers need, is not planned"
                ]
                * (model.sliding_window is not None and model.sliding_window < length)
            ),
        ]
    )


def rate_of(config: Config, step: int) -> float:
    """The learning rate of a 0-based step of a phase."""
    from megadyn.engine.optimizer import learning_rate  # torch, seconds of imports: only for phases

    return learning_rate(config.optimizer, step, config.last_iteration)


HEADER = "tensor pipe data ZeRO    micro recompute   GiB bubble  sent GB  step s  tokens/s"


def table(rows: Sequence[Layout]) -> str:
    """One line of 80 columns per layout. `micro`: micro-batches x samples; `sent GB`: by one rank per step; `*`: offloaded."""
    lines = [HEADER]
    for row in rows:
        micro, recompute = f"{row.micro_batches}x{row.micro_batch}", row.recompute
        zero = f"{row.zero_stage}{'*' if row.host else ''}"
        sent = (row.tensor_bytes + row.pipeline_bytes + row.data_bytes + row.optimizer_bytes) / 1e9
        lines.append(
            f"{row.tensor:>6} {row.pipeline:>4} {row.data:>4} {zero:>4} {micro:>8} {recompute:>9} "
            f"{row.memory.total / GIB:>5.1f} {row.bubble:>6.1%} {sent:>8.1f} {row.step_s:>7.3g} "
            f"{row.tokens_per_second:>9,.0f}"
        )
    if host := max(row.host for row in rows):
        lines.append(f"\n* offloaded: up to {host / GIB:.1f} GiB of each node's host memory")
    return "\n".join(lines)


def reasons(refused: Sequence[Refusal]) -> str:
    """How often each reason occurred, most frequent first."""
    met = Counter(refusal.reason for refusal in refused).most_common()
    return "\n".join(
        textwrap.fill(
            f"{count:>5}  {reason}",
            79,
            subsequent_indent=" " * 7,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for reason, count in met
    )
