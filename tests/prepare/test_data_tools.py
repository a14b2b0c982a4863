"""The four data tools as a user runs them: processes, exit statuses, last lines."""

import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed_writer import IndexedWriter

TOOLS = Path(__file__).parents[2] / "tools"


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_refused(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.py").write_text("def f(x):\n    return x + 1\n" * 20)
    (folder / "b.jsonl").write_text('{"text": "def f(x): return x"}\n{"text": ""}\n')
    return folder


def test_text_to_dataset_and_back(tmp_path, corpus, run_tool_script):
    done = run_tool_script(
        "train_tokenizer", "--input", corpus, "--vocab-size", 270, "--output", tmp_path / "tok", "--json"
    )
    trained = last_json(done)
    assert (trained["vocab_size"], trained["eod"], trained["skipped"]) == (270, 0, 0)

    make = ("preprocess_data", "--input", corpus, "--tokenizer", tmp_path / "tok", "--append-eod", "--json")
    record = last_json(run_tool_script(*make, "--output-prefix", tmp_path / "x", "--workers", 2))
    assert (record["documents"], record["sequences"], record["skipped"]) == (3, 2, 0)

    seen = run_tool_script(
        "inspect_dataset",
        tmp_path / "x",
        "--verify",
        "--documents",
        9,
        "--tokenizer",
        tmp_path / "tok",
        "--json",
    )
    result = last_json(seen)
    assert {key: result[key] for key in ("documents", "sequences", "tokens", "sha256")} == {
        key: record[key] for key in ("documents", "sequences", "tokens", "sha256")
    }
    assert (result["dtype"], result["verified"], result["smallest_id"]) == ("uint16", True, 0)
    assert "def f(x): return x<|endoftext|>" in seen.stdout

    merged = last_json(
        run_tool_script(
            "merge_datasets",
            "--inputs",
            tmp_path / "x",
            tmp_path / "x",
            "--output-prefix",
            tmp_path / "xx",
            "--json",
        )
    )
    assert (merged["documents"], merged["tokens"]) == (6, 2 * record["tokens"])

    assert_refused(run_tool_script(*make, "--output-prefix", tmp_path / "x"), "exists already")
    last_json(run_tool_script(*make, "--output-prefix", tmp_path / "x", "--overwrite"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--input": "nowhere"}, "nowhere: no such file or folder"),
        ({"--input": "empty"}, "the corpus is empty"),
        ({"--input": "bad.jsonl"}, "bad.jsonl:2: invalid JSON"),
        ({"--input": "bad.txt"}, "bad.txt: not UTF-8"),
        ({"--text-key": "body"}, "no key 'body'"),
        ({"--tokenizer": "nowhere"}, "tokenizer nowhere: no such file"),
        ({"--tokenizer": "bad.txt"}, "neither a folder"),
        ({"--output-prefix": "bad.txt/x"}, "bad.txt"),
        ({"--engine": "gigatoken"}, "--engine gigatoken: the byte tokenizer needs no other engine"),
        ({"--input": "cut.jsonl.gz"}, "cut.jsonl.gz:1: damaged"),
        ({"--input": "bad.txt", "--format": "parquet"}, "bad.txt: cannot be read as Parquet"),
        ({"--input": "none*.jsonl"}, "none*.jsonl: no such file or folder"),
        ({"--max-documents": "0"}, "0: must be at least 1"),
        ({"--seed": "-1"}, "-1: must be at least 0"),
        ({"--output-prefix": ""}, "'': must end in a name"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path, monkeypatch, corpus, run_tool_script, changes, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}')[:-4])
    before = sorted(tmp_path.rglob("*"))
    options = {"--input": corpus, "--tokenizer": "byte", "--output-prefix": "x"} | changes
    assert_refused(
        run_tool_script("preprocess_data", *[part for option in options.items() for part in option]), sentence
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_skipped_documents_are_counted_in_the_summary(tmp_path, run_tool_script):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n{"body": 1}\n')
    done = run_tool_script(
        "preprocess_data",
        "--input",
        tmp_path / "bad.jsonl",
        "--tokenizer",
        "byte",
        "--output-prefix",
        tmp_path / "x",
        "--on-error",
        "skip",
        "--json",
    )
    assert last_json(done)["skipped"] == 2
    assert f"2 documents skipped, the first: {tmp_path / 'bad.jsonl'}:2" in done.stdout


@pytest.mark.parametrize("limit", ["file size", "file system"])
@pytest.mark.parametrize("at", ["the parts", "the dataset"])
def test_full_disk_is_one_line_and_leaves_no_dataset(tmp_path, limit, at):
    """Room for nothing, or for a part (200 KB of tokens) but not for its copy in the dataset."""
    (tmp_path / "a.txt").write_text("x" * 100_000)
    (tmp_path / "b.txt").write_text("x" * 50_000)
    out = tmp_path / "out"
    out.mkdir()
    tool = [
        sys.executable,
        str(TOOLS / "preprocess_data.py"),
        "--input",
        "a.txt",
        "b.txt",
        "--tokenizer",
        "byte",
        "--output-prefix",
        "out/x",
    ]
    unit = (
        "import megadyn.prepare.units as units; units.UNIT_BYTES = 1; import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    room = {"the parts": 64, "the dataset": 250 if limit == "file size" else 350}[at]
    command = shlex.join([sys.executable, "-c", unit, *tool[1:]])
    if limit == "file size":
        done = shell(f"ulimit -f {room}; {command}", tmp_path)
        reason = "File too large"
    else:
        if shell("unshare --map-root-user --mount mount -t tmpfs tmpfs out", tmp_path).returncode:
            pytest.skip("no file systems may be mounted here (unshare --map-root-user --mount)")
        script = (
            f"mount -t tmpfs -o size={room}k tmpfs out && {{ {command}; status=$?; ls out; exit $status; }}"
        )
        done = shell(f"unshare --map-root-user --mount bash -c {shlex.quote(script)}", tmp_path)
        reason = "No space left on device"
    assert_refused(done, reason)
    left = done.stdout.split() if limit == "file system" else [path.name for path in out.iterdir()]
    assert [name for name in left if name.startswith((".x", "x"))] == (
        [] if at == "the parts" else ["x.parts"]
    )


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)


def test_inspect_refuses_a_cut_dataset_and_another_tokenizer(
    tmp_path, corpus, run_tool_script, tokenizer_folder
):
    prefix = tmp_path / "x"
    last_json(
        run_tool_script(
            "preprocess_data", "--input", corpus, "--tokenizer", "byte", "--output-prefix", prefix, "--json"
        )
    )
    decode = ("inspect_dataset", prefix, "--documents", 1, "--tokenizer")
    assert_refused(run_tool_script(*decode, tokenizer_folder), "was made with tokenizer byte")
    (tmp_path / "x.json").unlink()
    assert run_tool_script(*decode, tokenizer_folder).returncode == 0  # nothing is known, and the ids fit
    with IndexedWriter(prefix, "<u2") as writer:
        writer.add(np.array([300]), [1], [1])
        writer.finish()
    assert_refused(run_tool_script(*decode, tokenizer_folder), "document 0 holds token id 300")
    with (tmp_path / "x.bin").open("r+b") as file:
        file.truncate(1)
    assert_refused(
        run_tool_script("inspect_dataset", tmp_path / "x"), "x.bin: 1 bytes, but its index describes"
    )


@pytest.mark.parametrize("tool", ["preprocess_data", "inspect_dataset", "help"])
def test_standard_output_that_takes_no_more_is_one_line_or_silence(tmp_path, corpus, tool):
    """A full disk, a pipe whose reader has gone, none at all."""
    prepare = [
        "preprocess_data.py",
        "--input",
        "corpus",
        "--tokenizer",
        "byte",
        "--output-prefix",
        "x",
        "--overwrite",
    ]
    name, *args = {
        "preprocess_data": prepare,
        "inspect_dataset": ["inspect_dataset.py", "x"],
        "help": ["inspect_dataset.py", "--help"],
    }[tool]
    if tool == "inspect_dataset":
        with IndexedWriter(tmp_path / "x", "<u2") as writer:
            writer.add(np.array([1]), [1], [1])
            writer.finish()
    command = f"PYTHONUNBUFFERED= {shlex.join([sys.executable, str(TOOLS / name), *args])}"
    full = shell(f"{command} >/dev/full", tmp_path)
    place = "standard output: " if tool == "preprocess_data" else ""
    assert (full.returncode, full.stderr) == (2, f"error: {place}No space left on device\n")
    closed = shell(f"{{ sleep 0.2; {command}; echo $? >&2; }} | true", tmp_path)
    assert closed.stderr.split() == ["141"]
    assert shell(f"{command} >&-", tmp_path).returncode == 0


def test_a_launcher_without_its_library_is_one_line(tmp_path, corpus):
    tool = str(TOOLS / "preprocess_data.py")
    script = f"import runpy, sys; sys.modules['mpi4py'] = None; runpy.run_path({tool!r}, run_name='__main__')"
    done = shell(f"PMI_SIZE=2 {shlex.join([sys.executable, '-c', script])}", tmp_path)
    assert_refused(done, "mpi4py or the MPI library is missing")


@pytest.mark.parametrize("name", ["train_tokenizer", "preprocess_data", "merge_datasets", "inspect_dataset"])
def test_wrong_arguments_are_status_2_and_help_is_0(run_tool_script, name):
    assert run_tool_script(name, "--no-such-flag").returncode == 2
    assert "usage: " in run_tool_script(name, "--help").stdout


def test_data_tools_start_without_torch_and_transformers():
    modules = [
        f"megadyn.{room}.{path.stem}"
        for room in ("prepare", "data", "tokenization")
        for path in (TOOLS.parent / "megadyn" / room).glob("[a-z]*.py")
    ]
    assert "megadyn.prepare.preprocess" in modules
    script = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not {
        "torch",
        "transformers",
        "tokenizers",
        "sentencepiece",
        "omegaconf",
        "pyarrow",
        "gigatoken",
        "awkward",
        "tqdm",
        "mpi4py",
    } & set(loaded)
