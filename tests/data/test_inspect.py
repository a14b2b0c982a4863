"""What tools/inspect_dataset.py shows of a dataset."""

import json

import numpy as np

from megadyn.data.indexed_writer import IndexedWriter


def test_counts_lengths_documents_and_samples(tmp_path, run_tool_script):
    with IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer.add(np.frombuffer(b"onetwo and threefour", np.uint8), [3, 4, 9, 0, 4], [1, 2, 0, 2])
        writer.finish()
    done = run_tool_script(
        "inspect_dataset",
        tmp_path / "x",
        "--verify",
        "--documents",
        9,
        "--samples",
        9,
        "--sequence-length",
        8,
        "--tokenizer",
        "byte",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {
        key: result[key] for key in ("documents", "sequences", "tokens", "dtype", "lengths", "verified")
    } == {
        "documents": 4,
        "sequences": 5,
        "tokens": 20,
        "dtype": "uint16",
        "verified": True,
        "lengths": {"0": 1, "2-3": 1, "4-7": 2, "8-15": 1},
    }
    shown = done.stdout.split("--- ", 1)[1].rpartition("\n{")[0]
    assert (
        shown
        == """document 0: 3 tokens
one
--- document 1: 13 tokens
two and three
--- document 2: 0 tokens

--- document 3: 4 tokens
four
--- sample 0: 9 tokens
onetwo an
--- sample 1: 9 tokens
nd threef"""
    )
    # looking leaves nothing behind
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]

    done = run_tool_script("inspect_dataset", tmp_path / "x", "--samples", 1, "--sequence-length", 20)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "too few for one sample of sequence length 20" in done.stderr
