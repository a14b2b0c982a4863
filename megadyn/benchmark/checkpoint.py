"""What a checkpoint costs: how long training waits for it, how fast it is written, verified and restored.

    megadyn benchmark checkpoint [--model dtf:0.5] [--hidden 512] [--layers 8] [--folder DIR] ...

One process trains as `megadyn.pretrain` does, under the engine settings of `--deepspeed-config`, and saves a checkpoint each
way, in turns: while training waits (`checkpoint.background: false`), and beside training. The stall is how long training waited;
beside training its steps are timed too. Files are synced to the disk before a checkpoint counts as written, but verifying and
restoring read what the page cache may hold. Medians count. A restored engine is compared with the saved one, bit by bit.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from megadyn.arguments import add_json_argument, command_parser
from megadyn.benchmark.clock import add_device_arguments, device_of, machine, timed, wait
from megadyn.benchmark.models import DEFAULT_MODELS, add_shape_arguments, config_of, shape_line
from megadyn.checkpoint import layout, save_load
from megadyn.checkpoint.writing import Snapshot, Writer
from megadyn.config import CheckpointConfig, Config, TrainingConfig, batch_plan
from megadyn.engine.engine import Engine
from megadyn.errors import UserError
from megadyn.launch import launch
from megadyn.parallel.grid import Grid
from megadyn.paths import user_path


@dataclass
class Round:
    """Seconds of one checkpoint."""

    copy: float
    """To host memory; training waits for it in any case."""
    write: float
    """From there to files that are synced, hashed and published."""
    stall: float
    """That training waited, in all."""
    step_beside: float | None
    """Of a training step while a checkpoint was written; None where training waited."""


@dataclass
class Figures:
    parameters: int
    bytes: int
    """Of a checkpoint: weights and Adam's moments in fp32."""
    step: float
    """Of a training step alone, seconds."""
    waiting: Round
    background: Round
    verify: float
    restore: float
    """Reading into the engine, verification left out."""

    def per_second(self, seconds: float) -> float:
        """MB/s of what took so long for all of the checkpoint."""
        return self.bytes / seconds / 1e6


class Trainer:
    """An engine, and random tokens for it."""

    def __init__(self, config: Config, batch: int, device: torch.device):
        self.config, self.device = config, device
        self.engine = Engine(config, batch_plan(config, 1), Grid())
        assert config.model.vocab_size
        tokens = torch.randint(config.model.vocab_size, (batch, config.training.sequence_length + 1))
        self.batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]

    def step(self) -> float:
        """Seconds of it."""
        return timed(lambda: self.engine.train_step(self.batches, 1e-5), self.device)


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> Figures:
    torch.manual_seed(0)
    training = TrainingConfig(
        iterations=1000,
        global_batch_size=args.batch,
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
        checkpoint=CheckpointConfig(keep=1),
        output_dir=str(folder),
    )
    launch.join()
    try:
        trainer = Trainer(config, args.batch, device)
        trainer.step()
        size = save_load.snapshot(trainer.engine, iteration=0, consumed_samples=0).bytes
        check_room(folder, size)
        steps = [trainer.step() for _ in range(args.rounds)]
        writers = {
            kind: Writer(folder, replace(config, checkpoint=replace(config.checkpoint, background=kind)))
            for kind in (False, True)
        }
        rounds: dict[bool, list[Round]] = {False: [], True: []}
        for turn in range(args.warmup + args.rounds):
            for kind, writer in writers.items():
                found, saved = save_once(trainer, writer, 2 * turn + kind)
                if turn >= args.warmup:
                    rounds[kind].append(found)
        newest = layout.complete_checkpoints(folder)[0]
        verify, restore = (
            statistics.median(seconds)
            for seconds in zip(*(restored(trainer, newest, saved) for _ in range(args.rounds)))
        )
        count = sum(param.numel() for param in trainer.engine.parameters())
    finally:
        launch.leave()
    return Figures(
        count,
        size,
        statistics.median(steps),
        median_of(rounds[False]),
        median_of(rounds[True]),
        verify,
        restore,
    )


def check_room(folder: Path, size: int) -> None:
    """A checkpoint is removed when the next one stands. Raises UserError where two have no room."""
    if (free := shutil.disk_usage(folder).free) < 2 * size:
        raise UserError(
            f"--folder {folder}: two checkpoints need {2 * size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        )


def save_once(trainer: Trainer, writer: Writer, iteration: int) -> tuple[Round, Snapshot]:
    """As `training.checkpoints.Checkpoints.save` does it."""
    beside = []
    wait(trainer.device)
    began = time.perf_counter()
    snapshot = save_load.snapshot(trainer.engine, iteration=iteration, consumed_samples=0)
    copied = time.perf_counter()
    writer.start(snapshot)
    stall = time.perf_counter() - began
    while writer.is_busy:
        beside.append(trainer.step())
    began_to_wait = time.perf_counter()
    written = writer.collect()
    assert written is not None
    return Round(
        copied - began,
        written.write_s,
        stall + time.perf_counter() - began_to_wait,
        statistics.median(beside) if beside else None,
    ), snapshot


def restored(trainer: Trainer, folder: Path, saved: Snapshot) -> tuple[float, float]:
    """Seconds of verifying `folder` and of reading it into an engine that has gone on since. UserError if it is not `saved`."""
    trainer.step()
    problem: list[str | None] = []
    verify = timed(lambda: problem.append(save_load.verify(folder)), trainer.device)
    if problem[0]:
        raise UserError(problem[0])
    restore = timed(lambda: save_load.load(trainer.engine, folder), trainer.device)
    found = save_load.snapshot(trainer.engine, iteration=saved.iteration, consumed_samples=0)
    for name, shard in saved.shards.items():
        for tensor, value in shard.items():
            if not torch.equal(found.shards[name][tensor], value):
                raise UserError(f"{folder}: {tensor} is not what was saved")
    return verify, restore


def median_of(rounds: Sequence[Round]) -> Round:
    found: dict[str, Any] = {}
    for name in (f.name for f in fields(Round)):
        known = [value for each in rounds if (value := getattr(each, name)) is not None]
        found[name] = statistics.median(known) if known else None
    return Round(**found)


def as_table(figures: Figures) -> str:
    background, waiting = figures.background, figures.waiting
    beside = "" if background.step_beside is None else f"{background.step_beside * 1e3:.0f}"
    rows = [
        "| saving | copy, ms | write, ms | training waited, ms | step beside, ms | written, MB/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found, step in (("training waits", waiting, ""), ("in the background", background, beside)):
        rows.append(
            f"| {name} | {found.copy * 1e3:.0f} | {found.write * 1e3:.0f} | {found.stall * 1e3:.0f} | {step} | "
            f"{figures.per_second(found.write):,.0f} |"
        )
    rows += ["", "| resuming | ms | MB/s |", "|---|---|---|"]
    for name, seconds in (
        ("verify (sha256)", figures.verify),
        ("restore", figures.restore),
        ("both", figures.verify + figures.restore),
    ):
        rows.append(f"| {name} | {seconds * 1e3:.0f} | {figures.per_second(seconds):,.0f} |")
    return "\n".join(rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark checkpoint", __doc__)
    parser.add_argument(
        "--model", default=DEFAULT_MODELS[1], metavar="KIND[:CAPACITY]", help="(default: %(default)s)"
    )
    add_shape_arguments(
        parser, hidden=512, layers=8, heads=8, kv_heads=4, ffn=1408, sequence=256, rounds=3, warmup=1
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--deepspeed-config", default="zero1", metavar="NAME|FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--folder",
        type=user_path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="whose disk is measured; all that is written there is removed (default: %(default)s)",
    )
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = device_of(args)
    if launch.world_size() > 1:
        raise UserError("checkpoint: is one process's benchmark, and this is one of several")
    launch.check_device(device.type)
    if not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: is no folder")
    with tempfile.TemporaryDirectory(prefix="megadyn-checkpoint-", dir=args.folder) as folder:
        figures = measure(args, device, Path(folder))
    print(
        f"{machine(device)}, {args.precision}, {args.deepspeed_config}; {args.model}, {shape_line(args)}; "
        f"{figures.parameters / 1e6:,.1f}M parameters, {figures.bytes / 1e6:,.0f} MB a checkpoint; "
        f"a step takes {figures.step * 1e3:.0f} ms\n"
    )
    print(as_table(figures))
    if args.json:
        print(json.dumps(asdict(figures)))
