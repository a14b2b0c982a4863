"""Real runs of the main job, one after another: tokens/s and MFU as its metrics report them, and its memory beside the plan.

    megadyn benchmark engine [--models dense dtf:0.25 mod:0.125] [--deepspeed-config zero1] [--micro-batches 8] ...

`step` measures bare models; this is what a run gets: DeepSpeed's engine with fp32 master weights, several micro-batches in a
step, the loader, and metrics. Each model trains in a process of its own on random tokens, with a record every
`--steps` steps. The first record, which has the start in it, does not count; results are medians of `--rounds` more.
Then the process is ended: nothing is saved, because a checkpoint of a large model takes more disk than a machine may have.

Memory is torch's peak of allocated bytes on a GPU, which is what the plan predicts; a CPU has no such figure. Routers are as
they start.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megadyn.arguments import above_zero, add_json_argument, command_parser
from megadyn.benchmark.clock import add_device_arguments, device_of, machine
from megadyn.benchmark.models import DEFAULT_MODELS, add_shape_arguments, config_of, shape_line
from megadyn.config import (
    RECOMPUTE,
    Config,
    DataConfig,
    LoggingConfig,
    TrainingConfig,
    batch_plan,
    engine_settings,
)
from megadyn.config.load import save_config
from megadyn.data.indexed import dtype_for
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.errors import RunError, UserError
from megadyn.launch import launch
from megadyn.paths import user_path
from megadyn.planning.layouts import GIB, stage_cuts, workload
from megadyn.planning.memory import rank_memory

SAMPLES = 64
"""In the dataset; a run reads them again and again, in new orders."""
SMALLEST_VOCABULARY = 257
"""That of the byte tokenizer, which the runs name."""
PATIENCE_S = 420.0
"""Give up on a run that has not reported for this long."""
POLL_S = 0.05
CHOICES = ("attention: ", "kernels: ")
"""Lines of a run's log that the table repeats."""


@dataclass
class Figure:
    """What one run reported. Ratios are to the first model."""

    name: str
    seconds: float
    """Of a step."""
    tokens_per_second: float
    """Of all tokens, skipped ones too: dense-equivalent."""
    mfu_half: float | None
    """Causal attention counted at half; None if the device's peak is unknown."""
    mfu_full: float | None
    measured_gib: float | None
    """Peak of allocated bytes; None on a CPU."""
    planned_gib: float
    choices: list[str]
    """Which attention and kernels ran, and why, as its log says."""
    ratio: float = 1.0
    """Tokens/s relative to the first model."""


def config_for(name: str, args: argparse.Namespace, folder: Path) -> Config:
    """The run of KIND[:CAPACITY], in `folder` on the dataset beside it."""
    training = TrainingConfig(
        iterations=args.steps * (args.rounds + 2),
        global_batch_size=args.batch * args.micro_batches,
        micro_batch_size=args.batch,
        sequence_length=args.sequence,
        kernels=args.kernels,
        recompute=args.recompute,
        compile=args.compile,
    )
    return config_of(
        name,
        args,
        training=training,
        precision=args.precision,
        deepspeed_config=args.deepspeed_config,
        data=DataConfig(train=str(folder.parent / "data")),
        output_dir=str(folder),
        logging=LoggingConfig(
            interval=args.steps, tensorboard=False, live="never", peak_tflops=args.peak_tflops
        ),
    )


def write_data(args: argparse.Namespace, prefix: Path) -> None:
    """Random tokens, in documents of one sample each."""
    length = args.sequence + 1
    tokens = np.random.default_rng(0).integers(args.vocab, size=SAMPLES * length)
    with IndexedWriter(prefix, dtype_for(args.vocab)) as writer:
        writer.add(tokens, [length] * SAMPLES, [1] * SAMPLES)
        writer.finish()


def planned_gib(config: Config) -> float:
    zero = engine_settings(config)["zero_optimization"]
    memory = rank_memory(
        workload(config),
        stage_cuts(config),
        0,
        precision=config.precision,
        zero=zero,
        data=1,
        micro_batches=batch_plan(config, 1).micro_batches,
    )
    return memory.total / GIB


def records_of(config: Config, wanted: int, device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The first `wanted` records of a run and the lines of its log, from a process that ends with the last of them."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    metrics, log, file = folder / "metrics.jsonl", folder / "log.txt", folder / "given.yaml"
    save_config(config, file)
    # As the launch scripts have it.
    memory = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    variables = {"PYTORCH_ALLOC_CONF": memory} | os.environ
    if device == "cpu":
        variables["DS_ACCELERATOR"] = "cpu"
    with log.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "megadyn.pretrain", str(file)], env=variables, stdout=output, stderr=output
        )
        try:
            end = time.monotonic() + PATIENCE_S
            while len(records := read_records(metrics)) < wanted:
                if run.poll() is not None:
                    raise RunError(f"the run of {folder.name} ended early: {last_line(log)}")
                if time.monotonic() > end:
                    raise RunError(
                        f"the run of {folder.name} reported {len(records)} of {wanted} times within {PATIENCE_S:g} s"
                    )
                time.sleep(POLL_S)
        finally:
            run.kill()
            run.wait()
    return records[:wanted], log.read_text().splitlines()


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """The records of training steps whose lines are complete."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [record for record in map(json.loads, lines) if "step_time_ms" in record]


def last_line(log: Path) -> str:
    lines = log.read_text().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def figure_of(name: str, config: Config, records: Sequence[dict[str, Any]], log: Sequence[str]) -> Figure:
    """`records`: those that count."""

    def middle(key: str) -> float | None:
        found = [record[key] for record in records]
        return None if None in found else statistics.median(found)

    milliseconds = middle("step_time_ms")
    assert milliseconds is not None
    return Figure(
        name,
        milliseconds / 1e3,
        config.training.tokens_per_step / milliseconds * 1e3,
        middle("mfu_causal_half"),
        middle("mfu_whole_square"),
        records[-1]["memory_gib"].get("allocated_peak"),
        planned_gib(config),
        [line[line.index(start) :] for start in CHOICES for line in log if start in line],
    )


def measure(args: argparse.Namespace, device: str) -> list[Figure]:
    if args.vocab < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab {args.vocab}: must be at least {SMALLEST_VOCABULARY}, the byte tokenizer's")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="megadyn-engine-", dir=args.folder) as scratch:
        configs = {
            name: config_for(name, args, Path(scratch) / name.replace(":", "-")) for name in args.models
        }
        for config in configs.values():  # refuse all that cannot run before anything starts
            engine_settings(config)
        write_data(args, Path(scratch) / "data")
        for name, config in configs.items():
            records, log = records_of(config, args.rounds + 1, device)
            figure = figure_of(name, config, records[1:], log)
            figure.ratio = figure.tokens_per_second / (figures or [figure])[0].tokens_per_second
            figures.append(figure)
    return figures


def as_table(figures: Sequence[Figure]) -> str:
    rows = [
        "| model | ms a step | tokens/s, dense-equivalent | MFU, half / full attention "
        "| planned, GiB | measured | measured / planned |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        known = figure.mfu_half is not None and figure.mfu_full is not None
        mfu = f"{figure.mfu_half:.1%} / {figure.mfu_full:.1%}" if known else ""
        measured = figure.measured_gib
        memory = " | " if measured is None else f"{measured:.2f} | {measured / figure.planned_gib:.2f}"
        rows.append(
            f"| {figure.name} | {figure.seconds * 1e3:.1f} | {figure.tokens_per_second:,.0f} ({figure.ratio:.2f}x) | {mfu} | "
            f"{figure.planned_gib:.2f} | {memory} |"
        )
    return "\n".join(rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark engine", __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=DEFAULT_MODELS,
        metavar="KIND[:CAPACITY]",
        help="ratios are to the first (default: %(default)s)",
    )
    add_shape_arguments(parser, micro_batches=8, steps=5, rounds=3)
    add_device_arguments(parser)
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none", help="as training.recompute")
    parser.add_argument("--compile", action="store_true", help="as training.compile")
    parser.add_argument(
        "--deepspeed-config", default="zero1", metavar="NAME|FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--peak-tflops", type=above_zero, metavar="N", help="peak of the device (default: its datasheet's)"
    )
    parser.add_argument(
        "--folder", type=user_path, metavar="DIR", help="where the runs write (default: a temporary folder)"
    )
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = device_of(args)
    launch.check_device(device.type)
    figures = measure(args, device.type)
    print(
        f"{machine(device)}, {args.precision}, {args.deepspeed_config}, recompute: {args.recompute}"
        f"{', compiled' if args.compile else ''}; {shape_line(args)} per micro-batch, "
        f"{args.micro_batches} micro-batches a step, median of {args.rounds} x {args.steps} steps\n"
    )
    print(as_table(figures))
    for choice in dict.fromkeys(choice for figure in figures for choice in figure.choices):
        print(f"\n{choice}")
    if args.json:
        print(json.dumps([asdict(figure) for figure in figures]))
