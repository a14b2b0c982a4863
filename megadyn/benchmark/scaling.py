"""A training step on 1, 2 and 4 processes in tensor, pipeline and data parallelism, compared with the same step on one process.

    megadyn benchmark scaling [--layouts 1x1x1 2x1x1 1x2x1 1x1x2 ...] [--model dense] [--global-batch 8] ...

A layout is tensor x pipeline x data. All layouts start their processes on this machine at the beginning. They take
turns, step by step, on the same samples of one global batch (strong scaling); results are medians. All layouts must
give the losses of the first. On a CPU each process has `--threads` threads; with more threads than cores, the speed-up
cannot exceed cores / threads. On GPUs each process has its own GPU.
"""

import argparse
import json
import math
import multiprocessing
import os
import socket
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from megadyn.arguments import add_json_argument, command_parser
from megadyn.benchmark.clock import add_device_arguments, device_of, machine, wait
from megadyn.benchmark.models import add_shape_arguments, config_of, shape_line
from megadyn.config import Config, ParallelConfig, TrainingConfig, batch_plan, engine_settings
from megadyn.data.batches import micro_batch_ids
from megadyn.engine.engine import Engine
from megadyn.errors import RunError, UserError
from megadyn.launch import launch
from megadyn.parallel.grid import make_grid

DEFAULT = ("1x1x1", "2x1x1", "1x2x1", "1x1x2", "4x1x1", "1x4x1", "1x1x4")
RATE = 1e-4
"""Learning rate: so small that layouts stay together."""
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative difference of losses between layouts."""
PATIENCE_S = 600.0
"""Give up if a process does not answer for this long."""


class Layout(NamedTuple):
    tensor: int
    pipeline: int
    data: int

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return "x".join(str(size) for size in self)


@dataclass
class Figure:
    """Measurements of one layout."""

    layout: str
    processes: int
    seconds: float
    fastest: float
    tokens_per_second: float
    speedup: float = 1.0
    """Relative to the first layout."""
    efficiency: float = 1.0
    """Speed-up divided by the number of processes relative to the first layout's."""
    possible: float = 1.0
    """Largest efficiency that the number of cores allows; 1 if each process has its own cores."""
    loss: float = field(default=math.nan)
    """Loss of the last step."""


def config_for(layout: Layout, args: argparse.Namespace) -> Config:
    training = TrainingConfig(
        iterations=1000,
        global_batch_size=args.global_batch,
        micro_batch_size=args.batch,
        sequence_length=args.sequence,
        kernels=args.kernels,
    )
    config = config_of(
        args.model,
        args,
        training=training,
        precision=args.precision,
        deepspeed_config=args.deepspeed_config,
        parallel=ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline),
    )
    engine_settings(config)
    batch_plan(config, layout.processes)
    return config


class Crew:
    """The processes of one layout."""

    def __init__(self, layout: Layout, args: argparse.Namespace):
        self.layout = layout
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        method = multiprocessing.get_context("forkserver")
        self.lines: list[Connection] = []
        self.ranks = []
        for rank in range(layout.processes):
            ours, theirs = method.Pipe()
            process = method.Process(target=_be_rank, args=(theirs, layout, rank, port, args), daemon=True)
            process.start()
            theirs.close()
            self.lines.append(ours)
            self.ranks.append(process)

    def wait_until_ready(self) -> None:
        for rank in range(self.layout.processes):
            self.answer(rank)

    def step(self, number: int) -> tuple[float, float]:
        """Loss of step `number`, and the seconds of the slowest rank."""
        for line in self.lines:
            line.send(number)
        answers = [self.answer(rank) for rank in range(len(self.lines))]
        return answers[0][0], max(seconds for _, seconds in answers)

    def answer(self, rank: int) -> Any:
        """The answer of a rank. Raises RunError for a rank that failed, died or does not answer."""
        line = self.lines[rank]
        try:
            if not line.poll(PATIENCE_S):
                raise RunError(f"layout {self.layout}: rank {rank} did not answer for {PATIENCE_S:g} s")
            said = line.recv()
        except (EOFError, ConnectionError):
            raise RunError(f"layout {self.layout}: rank {rank} died") from None
        if isinstance(said, str):
            raise RunError(f"layout {self.layout}: rank {rank} failed: {said}")
        return said

    def end(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()


def _be_rank(line: Connection, layout: Layout, rank: int, port: int, args: argparse.Namespace) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(layout.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(layout.processes),
        "OMP_NUM_THREADS": str(args.threads),
    }
    torch.set_num_threads(args.threads)
    try:
        _work(line, layout, args)
    except Exception as error:
        traceback.print_exc()
        line.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _work(line: Connection, layout: Layout, args: argparse.Namespace) -> None:
    """Sends None when ready, then the loss and seconds of each step whose number it receives. Gets killed at the end."""
    config = config_for(layout, args)
    launch.join(PATIENCE_S)
    plan, grid = batch_plan(config, layout.processes), make_grid(layout.tensor, layout.pipeline)
    engine = Engine(config, plan, grid)
    line.send(None)
    while True:
        number = line.recv()
        samples = torch.randint(
            args.vocab,
            (args.global_batch, args.sequence + 1),
            generator=torch.Generator().manual_seed(number),
        )
        ids = micro_batch_ids(
            0,
            args.global_batch,
            global_batch=args.global_batch,
            micro_batch=plan.micro_batch,
            dp_rank=grid.dp.rank,
            dp_size=grid.dp.size,
        )
        parts = [samples[list(part)] for part in ids]
        wait(engine.device)
        began = time.perf_counter()
        result = engine.train_step(
            ((part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts), RATE
        )
        wait(engine.device)
        line.send((float(result.loss), time.perf_counter() - began))


def measure(args: argparse.Namespace, layouts: Sequence[Layout]) -> list[Figure]:
    for layout in layouts:
        config_for(layout, args)  # refuse a bad configuration before anything starts
    crews: list[Crew] = []
    times: list[list[float]] = [[] for _ in layouts]
    losses = [math.nan] * len(layouts)
    try:
        for layout in layouts:  # one after another, because two could pick the same port
            crews.append(Crew(layout, args))
            crews[-1].wait_until_ready()
        for turn in range(args.warmup + args.rounds):
            for number, crew in enumerate(crews):
                losses[number], seconds = crew.step(turn)
                if turn >= args.warmup:
                    times[number].append(seconds)
            check_losses(layouts, losses, args.precision)
    finally:
        for crew in crews:
            crew.end()
    return figures_of(layouts, times, losses, args)


def check_losses(layouts: Sequence[Layout], losses: Sequence[float], precision: str) -> None:
    """Raises RunError for a layout whose loss differs from the first layout's."""
    for layout, loss in zip(layouts, losses):
        if not abs(loss - losses[0]) <= TOLERANCE[precision] * abs(losses[0]):
            raise RunError(f"layout {layout}: the loss is {loss}, but {losses[0]} under {layouts[0]}")


def figures_of(
    layouts: Sequence[Layout], times: Sequence[list[float]], losses: Sequence[float], args: argparse.Namespace
) -> list[Figure]:
    figures: list[Figure] = []
    for layout, found, loss in zip(layouts, times, losses):
        seconds = statistics.median(found)
        figure = Figure(
            str(layout),
            layout.processes,
            seconds,
            min(found),
            args.global_batch * args.sequence / seconds,
            loss=loss,
        )
        first = figures[0] if figures else figure
        figure.speedup = first.seconds / seconds
        more = layout.processes / first.processes
        figure.efficiency = figure.speedup / more
        if args.device == "cpu":
            figure.possible = (
                cores_used(layout.processes, args.threads) / cores_used(first.processes, args.threads) / more
            )
        figures.append(figure)
    return figures


def cores_used(processes: int, threads: int) -> int:
    return min(os.cpu_count() or 1, processes * threads)


def as_table(figures: Sequence[Figure]) -> str:
    rows = [
        "| tensor x pipeline x data | processes | ms (fastest) | tokens/s | speed-up | efficiency (at most) | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {figure.layout} | {figure.processes} | {figure.seconds * 1e3:.1f} ({figure.fastest * 1e3:.1f}) | "
        f"{figure.tokens_per_second:,.0f} | {figure.speedup:.2f} | {figure.efficiency:.2f} ({figure.possible:.2f}) | "
        f"{figure.loss:.6f} |"
        for figure in figures
    ]
    return "\n".join(rows)


def layout_of(text: str) -> Layout:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} must be TENSORxPIPELINExDATA, such as 2x1x1")
    return Layout(*map(int, sizes))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark scaling", __doc__)
    parser.add_argument(
        "--layouts",
        nargs="+",
        type=layout_of,
        metavar="TxPxD",
        help=f"ratios are relative to the first (default: {' '.join(DEFAULT)}, on GPUs those that fit)",
    )
    parser.add_argument("--model", default="dense", metavar="KIND[:CAPACITY]", help="(default: %(default)s)")
    add_shape_arguments(
        parser,
        hidden=256,
        heads=8,
        ffn=704,
        vocab=4096,
        sequence=512,
        global_batch=8,
        threads=1,
        rounds=5,
        warmup=2,
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--deepspeed-config", default="zero1", metavar="NAME|FILE", help="(default: %(default)s)"
    )
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = device_of(args)
    args.device = device.type
    launch.check_device(device.type)
    layouts = args.layouts or [layout_of(text) for text in DEFAULT]
    if device.type == "cuda":
        fit = [layout for layout in layouts if layout.processes <= torch.cuda.device_count()]
        if args.layouts and fit != layouts:
            raise UserError(f"--layouts: more processes than the {torch.cuda.device_count()} GPUs here")
        layouts = fit
    # Import once; all processes are forked from this one.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["megadyn.benchmark.scaling"])
    figures = measure(args, layouts)
    sharing = (
        ""
        if device.type == "cuda"
        else f"; {args.threads} thread(s) per process, {os.cpu_count()} cores shared by all"
    )
    print(
        f"{machine(device)}, {args.precision}, {args.deepspeed_config}; {args.model}, {shape_line(args)} per micro-batch, "
        f"{args.global_batch} samples per step{sharing}\n"
    )
    print(as_table(figures))
    if args.json:
        print(json.dumps([asdict(figure) for figure in figures]))
