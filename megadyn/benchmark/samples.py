"""How fast an indexed dataset is opened, cut into samples, blended and read, and how much memory that takes.

    megadyn benchmark samples [--documents 10000000] [--folder DIR] [--json]

Each figure is the best of several runs, each in its own process with one thread. On a shared machine compare the
figures by CPU time. Memory is the peak of the whole process, including mapped files. The datasets contain random
tokens; they are created in a temporary folder in DIR and removed at the end.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.data.blend import BLOCK, Schedule
from megadyn.data.indexed import HEADER, MAGIC, VERSION, IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.inspection import verify
from megadyn.data.samples import SampleSet, sample_places
from megadyn.errors import UserError, run_tool
from megadyn.files import os_errors_named
from megadyn.paths import user_path
from megadyn.prepare.merge import merge_datasets

LENGTH = 4096
MEAN_DOCUMENT = 400
BLEND = (0.4, 0.3, 0.2, 0.07, 0.03)
RUNS = 3
ROUNDS, SAMPLES_A_ROUND = 25, 2000
"""Rounds of reading per run, and samples per round."""


class Spent(NamedTuple):
    """What a measured piece of work took and did."""

    wall_s: float
    cpu_s: float
    amount: float
    """Work done, if the figure is a rate: samples or megabytes."""


class Clock:
    """Starts when created."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, amount: float = 1.0) -> Spent:
        return Spent(time.perf_counter() - self._wall, time.process_time() - self._cpu, amount)


@dataclass(frozen=True)
class Figure:
    what: str
    value: float
    cpu_value: float
    """The same value by CPU time."""
    unit: str
    goal: str
    """The project's goal, if there is one."""
    peak_mb: float


def measure(folder: Path, documents: int) -> list[Figure]:
    """All figures, for datasets of `documents` documents, a tenth of that, and a fortieth (the only one with real tokens)."""
    large, small, real = folder / "large", folder / "small", folder / "real"
    for prefix, count in ((large, documents), (small, documents // 10)):
        in_a_process(write_sparse, prefix, count)
    in_a_process(write_real, real, documents // 40)
    size = f"{documents:,}"
    return [
        figure(f"open a dataset of {documents // 10:,} documents", "ms", "under 50", open_dataset, small),
        figure(f"open a dataset of {size} documents", "ms", "", open_dataset, large),
        figure(f"sample index of {size} shuffled documents", "s", "under 1", cut_index, large),
        figure(
            "the same with key, shuffles and cache, as in a run's first start", "s", "", first_start, large
        ),
        figure("the same from the cache, verified", "s", "", later_start, large),
        figure(f"blend of {size} samples of {len(BLEND)} datasets", "s", "under 0.5", draw_blend, documents),
        figure(
            f"random samples of {LENGTH} tokens, 8 at a time, mapped",
            "1/s",
            "over 50,000",
            read_samples,
            real,
            8,
            True,
        ),
        figure("the same, one at a time", "1/s", "", read_samples, real, 1, True),
        figure("the same, 8 at a time, plain reads", "1/s", "", read_samples, real, 8, False),
        figure("merge, 2 datasets", "MB/s", "", merge_twice, real, folder / "merged"),
        figure("inspect --verify", "MB/s", "", verify_all, real),
    ]


def write_sparse(prefix: Path, documents: int) -> Spent:
    """An index that looks real, and a sparse .bin that takes no disk space."""
    clock = Clock()
    lengths = document_lengths(documents)
    ends = np.cumsum(lengths, dtype=np.int64)
    with Path(f"{prefix}.idx").open("wb") as index, Path(f"{prefix}.bin").open("wb") as tokens:
        index.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        for array in (lengths, (ends - lengths) * 2, np.arange(documents + 1)):
            index.write(array.data)
        tokens.truncate(2 * int(ends[-1]))
    return clock.stop()


def write_real(prefix: Path, documents: int) -> Spent:
    clock = Clock()
    lengths = document_lengths(documents)
    with IndexedWriter(prefix, "<u2") as writer:
        tokens = np.random.default_rng(1).integers(0, 2**16, int(lengths.sum(dtype=np.int64)), np.uint16)
        writer.add(tokens, lengths, np.ones(documents, np.int64))
        writer.finish()
    return clock.stop()


def document_lengths(documents: int) -> np.ndarray:
    """Log-normal, like those of web pages."""
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1, documents)
    return np.minimum(lengths + 1, 10**6).astype("<i4")


def open_dataset(prefix: Path) -> Spent:
    clock = Clock()
    IndexedDataset(prefix)
    return clock.stop()


def cut_index(prefix: Path) -> Spent:
    dataset = IndexedDataset(prefix)
    order = np.random.default_rng(0).permutation(len(dataset))
    clock = Clock()
    sample_places(dataset.sizes.take(order), LENGTH)
    return clock.stop()


def first_start(prefix: Path) -> Spent:
    with tempfile.TemporaryDirectory(dir=prefix.parent) as cache:
        return start(prefix, Path(cache))


def later_start(prefix: Path) -> Spent:
    with tempfile.TemporaryDirectory(dir=prefix.parent) as cache:
        start(prefix, Path(cache))
        return start(prefix, Path(cache))


def start(prefix: Path, cache: Path) -> Spent:
    dataset = IndexedDataset(prefix)
    clock = Clock()
    SampleSet(dataset, sequence_length=LENGTH, seed=1, cache_dir=cache).take([0])
    return clock.stop()


def draw_blend(samples: int) -> Spent:
    schedule = Schedule(BLEND)
    clock = Clock()
    for first in range(0, samples, BLOCK):
        schedule.draws(first, min(BLOCK, samples - first))
    return clock.stop()


def read_samples(prefix: Path, batch: int, mmap: bool) -> Spent:
    samples = SampleSet(IndexedDataset(prefix, mmap=mmap), sequence_length=LENGTH, seed=0)
    for first in range(0, len(samples), 64):  # load all pages into the page cache
        samples.take(range(first, min(first + 64, len(samples))))
    draw = np.random.default_rng(0)
    return min(
        read_round(samples, draw.integers(0, len(samples), (SAMPLES_A_ROUND // batch, batch)))
        for _ in range(ROUNDS)
    )


def read_round(samples: SampleSet, ids: np.ndarray) -> Spent:
    """ids [n, B]: few enough to fit between the time slices of other processes."""
    clock = Clock()
    for batch in ids:
        samples.take(batch)
    return clock.stop(ids.size)


def merge_twice(prefix: Path, output: Path) -> Spent:
    clock = Clock()
    merged = merge_datasets([prefix, prefix], output, overwrite=True)
    return clock.stop(merged.num_tokens * merged.dtype.itemsize / 1e6)


def verify_all(prefix: Path) -> Spent:
    dataset = IndexedDataset(prefix)
    clock = Clock()
    verify(dataset, 2**16)
    return clock.stop(dataset.num_tokens * dataset.dtype.itemsize / 1e6)


def figure(what: str, unit: str, goal: str, run: Callable[..., Spent], *args: object) -> Figure:
    runs = [in_a_process(run, *args) for _ in range(RUNS)]
    wall, cpu = min(spent.wall_s for spent, _ in runs), min(spent.cpu_s for spent, _ in runs)
    amount = runs[0][0].amount
    by = {"s": lambda s: s, "ms": lambda s: s * 1e3}.get(unit, lambda s: amount / s)
    return Figure(what, by(wall), by(cpu), unit, goal, max(peak for _, peak in runs))


def in_a_process(run: Callable[..., Spent], *args: object) -> tuple[Spent, float]:
    """(result of `run`, peak memory of the process in MB)."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_report, args=(there, run, args))
    process.start()
    there.close()
    try:
        spent, peak = here.recv()
    except EOFError:
        raise UserError(f"measuring {run.__name__} failed") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    return spent, peak


def _report(there: Connection, run: Callable[..., Spent], args: Sequence[object]) -> None:
    spent = run(*args)
    status = Path("/proc/self/status").read_text()
    peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    there.send((spent, peak_kb / 1e3))


def as_table(figures: Sequence[Figure]) -> str:
    """A Markdown table."""
    rows = [
        f"| {f.what} | {shown(f.value)} {f.unit} | {shown(f.cpu_value)} {f.unit} | {f.goal} | {f.peak_mb:,.0f} MB |"
        for f in figures
    ]
    return "\n".join(
        ["| what | measured | by CPU time | goal | peak memory |", "|---|---|---|---|---|", *rows]
    )


def shown(value: float) -> str:
    """At least three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark samples", __doc__)
    parser.add_argument(
        "--documents",
        type=positive,
        default=10_000_000,
        metavar="N",
        help="documents in the largest dataset, at least 1000",
    )
    parser.add_argument("--folder", type=user_path, default=Path(tempfile.gettempdir()), metavar="DIR")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    if args.documents < 1000:
        raise UserError(f"--documents {args.documents}: must be at least 1000")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with os_errors_named(args.folder), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(Path(folder), args.documents)
    print(as_table(figures))
    if args.json:
        print(json.dumps([asdict(f) for f in figures]))


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
