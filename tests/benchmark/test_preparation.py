import json
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from megadyn.benchmark.preparation import FORMS, SHARDS, write_shards
from megadyn.prepare.readers import Corpus

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


def test_data_benchmark_measures_every_way_and_cleans_up(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(TOOL),
            "data",
            "--megabytes",
            "2",
            "--rounds",
            "1",
            "--folder",
            str(tmp_path),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    tool, fast, floor, slow = json.loads(done.stdout.splitlines()[-1])
    assert fast["mb_per_second"] > slow["mb_per_second"] > 0
    assert min(one["cpu_seconds_per_mb"] for one in (tool, fast, floor, slow)) > 0
    assert 20 < tool["peak_mb"] < 1000
    assert "The tool: " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS[1:])
def test_shards_hold_the_documents_of_the_corpus(tmp_path, form):
    texts = [f"document {i}\n" * i for i in range(3 * SHARDS + 5)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(
        b"".join(orjson.dumps({"id": i, "text": text}) + b"\n" for i, text in enumerate(texts))
    )
    shards = write_shards(corpus, tmp_path / "shards", form)
    assert len(list(shards.iterdir())) == SHARDS
    assert list(Corpus([shards])) == texts


def test_unknown_benchmark_is_refused():
    done = subprocess.run([sys.executable, str(TOOL), "nothing"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True)
