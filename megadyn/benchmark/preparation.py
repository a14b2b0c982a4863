"""How fast text becomes a dataset, end to end, compared with the tokenizer alone.

    megadyn benchmark data [--megabytes 200] [--form jsonl] [--workers 2] [--rounds 3] [--folder DIR] [--json]

The corpus is JSONL made of source code and documentation found on this machine. If there is too little, it is repeated
with its lines in another order. With another `--form` the tool reads the same documents from shards in that format. The
runs take turns, each in its own processes. MB are 10^6 bytes of UTF-8 text. CPU time is summed over all processes;
prefer it if others use the machine too.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.data.indexed import files_of
from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.paths import user_path
from megadyn.prepare.compression import SUFFIXES as CODECS
from megadyn.prepare.readers import Corpus
from megadyn.prepare.train_tokenizer import train_tokenizer
from megadyn.tokenization.gigatoken import GigatokenTokenizer
from megadyn.tokenization.tokenizer import load_tokenizer

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".c")
DOCUMENT_BYTES = range(200, 400_000)
VOCAB_SIZE = 16_000
TRAINING_DOCUMENTS = 3_000
FAST_BYTES, SLOW_BYTES = 400_000_000, 4_000_000
"""Text per worker for the measurements that hold it in memory."""
POLL_SECONDS = 0.1
FAST_BATCH = 2**22
FORMS = ("jsonl", "parquet", "jsonl.gz", "jsonl.zst")
SHARDS, ROW_GROUP = 16, 1000
READY_SECONDS = 600
TOOL = ("-m", "megadyn", "preprocess")


class Run(NamedTuple):
    text_bytes: int
    seconds: float
    cpu_seconds: float
    peak_mb: float | None


@dataclass(frozen=True)
class Figure:
    what: str
    mb_per_second: float
    cpu_seconds_per_mb: float
    peak_mb: float | None
    """All processes together, shared memory counted once."""


def measure(folder: Path, megabytes: int, form: str, workers: int, rounds: int) -> list[Figure]:
    """The median run of each measurement."""
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    write_corpus(corpus, megabytes * 10**6)
    train_tokenizer(islice(Corpus([corpus]), TRAINING_DOCUMENTS), VOCAB_SIZE, tokenizer)
    source = corpus if form == "jsonl" else write_shards(corpus, folder / "shards", form)
    ways: dict[str, Callable[[], Run]] = {
        "megadyn preprocess, end to end": lambda: start_to_finish(
            source, tokenizer, folder / "dataset", workers
        ),
        "gigatoken alone, on parsed texts": lambda: in_processes(encode_fast, corpus, tokenizer, workers),
        "gigatoken with reading and parsing, nothing written": lambda: in_processes(
            encode_read, corpus, tokenizer, workers
        ),
        "one `tokenizers` encode per document": lambda: in_processes(encode_each, corpus, tokenizer, workers),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            runs[name].append(way())
    return [median_of(name, some) for name, some in runs.items()]


def median_of(what: str, runs: Sequence[Run]) -> Figure:
    peaks = [run.peak_mb for run in runs if run.peak_mb is not None]
    return Figure(
        what,
        statistics.median(run.text_bytes / run.seconds / 1e6 for run in runs),
        statistics.median(run.cpu_seconds / run.text_bytes * 1e6 for run in runs),
        max(peaks, default=None),
    )


def write_corpus(path: Path, size: int) -> None:
    files = texts_here()
    if not files:
        raise UserError(f"this machine has no {', '.join(SUFFIXES)} files to make a corpus of")
    draw, written, again = random.Random(0), 0, False
    with path.open("wb") as out:
        while True:
            for file in draw.sample(files, len(files)):
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue  # one unreadable file among thousands
                if again:
                    lines = text.splitlines(keepends=True)
                    text = "".join(draw.sample(lines, len(lines)))
                written += out.write(orjson.dumps({"id": written, "source": file.name, "text": text}) + b"\n")
                if written >= size:
                    return
            again = True


def write_shards(corpus: Path, folder: Path, form: str) -> Path:
    """Splits the lines of `corpus` evenly into `SHARDS` files; returns their folder."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    with corpus.open("rb") as file:
        count = sum(1 for _ in file)
    with corpus.open("rb") as file:
        for i in range(SHARDS):
            lines = list(islice(file, count * (i + 1) // SHARDS - count * i // SHARDS))
            path = folder / f"{i:02d}.{form}"
            if form == "parquet":
                table = pyarrow.Table.from_pylist([orjson.loads(line) for line in lines])
                pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
            else:
                with pyarrow.CompressedOutputStream(path, CODECS[path.suffix]) as packed:
                    packed.write(b"".join(lines))
    return folder


def texts_here() -> list[Path]:
    roots = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("stdlib"),
        "/usr/lib/python3",
        "/usr/share/doc",
    }
    found = (path for root in sorted(roots) for path in Path(root).rglob("*") if path.suffix in SUFFIXES)
    return sorted({path for path in found if path.is_file() and path.stat().st_size in DOCUMENT_BYTES})


def start_to_finish(corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> Run:
    """Runs the tool as a user does, including the start of Python and all imports."""
    for path in files_of(prefix).values():
        path.unlink(missing_ok=True)  # not timed: removes the output of the previous round
    before, began = cpu_of_children(), time.perf_counter()
    command = [
        sys.executable,
        *TOOL,
        "--input",
        str(corpus),
        "--tokenizer",
        str(tokenizer),
        "--output-prefix",
        str(prefix),
        "--append-eod",
        "--workers",
        str(workers),
        "--engine",
        "gigatoken",
        "--json",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        watch = MemoryWatch(process.pid)
        try:
            output, error = process.communicate()
            seconds = time.perf_counter() - began
        except BaseException:  # a signal to this process or its terminal does not reach another session
            process.terminate()
            raise
        finally:
            peak = watch.peak_mb()
    if process.returncode:
        raise UserError(f"megadyn preprocess failed: {error}")
    record = json.loads(output.splitlines()[-1])
    return Run(record["text_bytes"], seconds, cpu_of_children() - before, peak)


Prepare = Callable[[Path, Path, int, int], Callable[[], int]]
"""(corpus, tokenizer, worker, number of workers) -> the work to time, which returns the number of bytes of text."""


def in_processes(prepare: Prepare, corpus: Path, tokenizer: Path, workers: int) -> Run:
    """Runs in `workers` processes, timed from when all are ready until the last ends."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(workers + 1), context.SimpleQueue()
    arguments = [(prepare, corpus, tokenizer, i, workers, ready, results) for i in range(workers)]
    processes = [context.Process(target=timed, args=some, daemon=True) for some in arguments]
    for process in processes:
        process.start()
    ready.wait(READY_SECONDS)
    began = time.perf_counter()
    found = [results.get() for _ in processes]
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return Run(sum(size for size, _ in found), seconds, sum(cpu for _, cpu in found), None)


def timed(
    prepare: Prepare, corpus: Path, tokenizer: Path, worker: int, workers: int, ready: Any, results: Any
) -> None:
    work = prepare(corpus, tokenizer, worker, workers)
    ready.wait(READY_SECONDS)
    began = time.process_time()
    results.put((work(), time.process_time() - began))


def encode_fast(corpus: Path, tokenizer: Path, worker: int, workers: int) -> Callable[[], int]:
    """gigatoken's own batch call."""
    batches, held = [], 0
    for batch in text_batches(corpus, worker, workers):
        batches.append(batch)
        held += sum(map(len, batch))
        if held >= FAST_BYTES:
            break
    return encode_batches(tokenizer, lambda: batches, held)


def encode_read(corpus: Path, tokenizer: Path, worker: int, workers: int) -> Callable[[], int]:
    """The minimum for any tool that reads this JSONL: read, parse and encode its lines."""
    size = sum(map(len, texts_of(corpus, worker, workers)))
    return encode_batches(tokenizer, lambda: text_batches(corpus, worker, workers), size)


def encode_batches(
    tokenizer: Path, batches: Callable[[], Iterable[list[bytes]]], size: int
) -> Callable[[], int]:
    engine = GigatokenTokenizer(load_tokenizer(tokenizer)).engine
    engine.encode_batch(["x"], parallel=False)  # the first call imports `awkward`; do not time that

    def work() -> int:
        for texts in batches():
            engine.encode_batch(texts, parallel=False)
        return size

    return work


def text_batches(corpus: Path, worker: int, workers: int) -> Iterator[list[bytes]]:
    """Batches of at least `FAST_BATCH` bytes; other sizes are no faster."""
    batch, left = [], FAST_BATCH
    for text in texts_of(corpus, worker, workers):
        batch.append(text)
        left -= len(text)
        if left <= 0:
            yield batch
            batch, left = [], FAST_BATCH
    yield batch


def encode_each(corpus: Path, tokenizer: Path, worker: int, workers: int) -> Callable[[], int]:
    import tokenizers

    engine = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts: list[str] = []
    size = 0
    for text in texts_of(corpus, worker, workers):
        texts.append(text.decode())
        size += len(text)
        if size >= SLOW_BYTES:
            break

    def work() -> int:
        for text in texts:
            _ = engine.encode(text, add_special_tokens=False).ids
        return size

    return work


def texts_of(path: Path, worker: int, workers: int) -> Iterator[bytes]:
    """This worker's part of the corpus."""
    corpus = Corpus([path])
    for unit in corpus.units()[worker::workers]:
        yield from corpus.read(unit)


def cpu_of_children() -> float:
    """CPU seconds of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class MemoryWatch:
    """Peak memory of all processes of a session, sampled every `POLL_SECONDS`."""

    def __init__(self, session: int) -> None:
        self._session, self._peak, self._stop = session, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def peak_mb(self) -> float:
        """Stops sampling and returns the peak."""
        self._stop.set()
        self._thread.join()
        return self._peak / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._peak = max(self._peak, sum(map(self._memory, Path("/proc").glob("[0-9]*"))))

    def _memory(self, process: Path) -> int:
        """Bytes; memory shared by several processes is divided among them."""
        try:
            if os.getsid(int(process.name)) != self._session:
                return 0
            lines = process.joinpath("smaps_rollup").read_text().splitlines()
        except (OSError, ProcessLookupError):
            return 0  # the process has just ended
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def as_table(figures: Sequence[Figure], megabytes: int, form: str) -> str:
    what = f"{megabytes} MB of JSONL" + ("" if form == "jsonl" else f", for the tool as {form}")
    rows = [f"| {what} | MB/s | CPU s per MB | peak memory, MB |", "|---|---|---|---|"]
    for figure in figures:
        peak = "" if figure.peak_mb is None else f"{figure.peak_mb:.0f}"
        rows.append(
            f"| {figure.what} | {figure.mb_per_second:.1f} | {figure.cpu_seconds_per_mb:.4f} | {peak} |"
        )
    tool, *others = figures
    for other in others:
        ratio, cpu_ratio = (
            tool.mb_per_second / other.mb_per_second,
            other.cpu_seconds_per_mb / tool.cpu_seconds_per_mb,
        )
        rows += ["", f"The tool: {ratio:.2f} times {other.what}; by CPU time {cpu_ratio:.2f} times."]
    return "\n".join(rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark data", __doc__)
    parser.add_argument(
        "--megabytes", type=positive, default=200, metavar="N", help="size of the corpus (default: 200)"
    )
    parser.add_argument(
        "--form", choices=FORMS, default="jsonl", help="input format of the tool (default: jsonl)"
    )
    parser.add_argument("--workers", type=positive, default=2, metavar="N")
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="rounds; the median is reported (default: 3)"
    )
    parser.add_argument(
        "--folder",
        type=user_path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where the corpus is created, and removed afterwards",
    )
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with os_errors_named(args.folder), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(Path(folder), args.megabytes, args.form, args.workers, args.rounds)
    print(as_table(figures, args.megabytes, args.form))
    if args.json:
        print(json.dumps([asdict(one) for one in figures]))
