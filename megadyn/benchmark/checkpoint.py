"""What a checkpoint costs: how long training waits for it, and how fast it is written, verified and restored.

    megadyn benchmark checkpoint [--model dtf:0.5] [--hidden 512] [--layers 8] [--folder DIR] ...

One process trains as `megadyn.pretrain` does, with the engine settings of `--deepspeed-config`. It saves checkpoints in
both ways in turn: while training waits (`checkpoint.background: false`), and in the background. The stall is how long
training waited. Training steps are also timed while a checkpoint is written in the background. A checkpoint counts as
written once its files are synced to disk; verifying and restoring may read from the page cache. Results are medians. A
restored engine is compared bit by bit.
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
from megadyn.checkpoint.host_copies import HostCopies
from megadyn.checkpoint.writing import Snapshot, Writer
from megadyn.config import CheckpointConfig, Config, TrainingConfig, batch_plan
from megadyn.engine.engine import Engine
from megadyn.errors import UserError
from megadyn.launch import launch
from megadyn.parallel.grid import Grid
from megadyn.paths import user_path


@dataclass
class Round:
    """Times of one checkpoint, in seconds."""

    copy: float
    """Copying to host memory; training always waits for this."""
    write: float
    """Writing the copy to files, syncing, hashing and publishing them."""
    stall: float
    """Total time that training waited."""
    step_beside: float | None
    """A training step while a checkpoint is written in the background; None if training waited."""


@dataclass
class Figures:
    parameters: int
    bytes: int
    """Size of a checkpoint: weights and Adam's moments in fp32."""
    step: float
    """Seconds of a training step without a checkpoint."""
    waiting: Round
    background: Round
    verify: float
    restore: float
    """Seconds to read a checkpoint into the engine, without verification."""

    def per_second(self, seconds: float) -> float:
        """MB/s, given the time for the whole checkpoint."""
        return self.bytes / seconds / 1e6


class Trainer:
    """An engine, and random tokens to train it on."""

    def __init__(self, config: Config, batch: int, device: torch.device):
        self.config, self.device = config, device
        self.engine = Engine(config, batch_plan(config, 1), Grid())
        self.copies = HostCopies()
        assert config.model.vocab_size
        tokens = torch.randint(config.model.vocab_size, (batch, config.training.sequence_length + 1))
        self.batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]

    def step(self) -> float:
        """Runs one step and returns its seconds."""
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
    """Raises UserError unless two checkpoints fit on the disk: the old one is removed only after the new one is complete."""
    if (free := shutil.disk_usage(folder).free) < 2 * size:
        raise UserError(
            f"--folder {folder}: two checkpoints need {2 * size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        )


def save_once(trainer: Trainer, writer: Writer, iteration: int) -> tuple[Round, Snapshot]:
    """Saves as `training.checkpoints.Checkpoints.save` does."""
    beside = []
    wait(trainer.device)
    began = time.perf_counter()
    snapshot = save_load.snapshot(
        trainer.engine, iteration=iteration, consumed_samples=0, copies=trainer.copies
    )
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
    """Seconds to verify `folder`, and to read it into an engine that has trained on. UserError if it differs from `saved`."""
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
                raise UserError(f"{folder}: {tensor} differs from what was saved")
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
        help="measure the disk that holds DIR; all files written there are removed (default: %(default)s)",
    )
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = device_of(args)
    if launch.world_size() > 1:
        raise UserError("benchmark checkpoint: runs in one process, but several were started")
    launch.check_device(device.type)
    if not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: not a folder")
    with tempfile.TemporaryDirectory(prefix="megadyn-checkpoint-", dir=args.folder) as folder:
        figures = measure(args, device, Path(folder))
    print(
        f"{machine(device)}, {args.precision}, {args.deepspeed_config}; {args.model}, {shape_line(args)}; "
        f"{figures.parameters / 1e6:,.1f}M parameters, {figures.bytes / 1e6:,.0f} MB per checkpoint; "
        f"a step takes {figures.step * 1e3:.0f} ms\n"
    )
    print(as_table(figures))
    if args.json:
        print(json.dumps(asdict(figures)))
