"""tools/routing_report.py as a user runs it: a page, or one sentence and status 2 with nothing half-written."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megadyn.errors import run_tool
from tests.helpers.tiny import ROOT

TOOL = ROOT / "tools" / "routing_report.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("routing_report_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool, capsys, *args):
    """(exit status, standard output, standard error)"""
    status = run_tool(lambda: tool.main([str(arg) for arg in args]))
    return status, *capsys.readouterr()


def test_a_page_and_its_summary(tool, make_run, tmp_path, capsys):
    first, second, output = make_run("dtf", "one"), make_run("dense", "two"), tmp_path / "a.html"
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"iter')
    status, out, _ = run(
        tool, capsys, first, "--compare", second, "--output", output, "--tokens", 20, "--json"
    )
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert result["bytes"] == output.stat().st_size
    one, two = result["runs"]
    assert (one["iteration"], one["training_records"], one["text_tokens"], one["no_text"]) == (6, 6, 20, None)
    assert (one["checkpoints"], one["damaged_checkpoints"], one["notes"]) == (1, 0, [])
    assert two["text_tokens"] == 0 and "dense" in two["no_text"]
    assert "incomplete" in two["notes"][0] and two["notes"][0] in out
    assert sorted(
        path.name for path in tmp_path.iterdir() if path.is_file() and path.name.startswith((".", "a"))
    ) == ["a.html"]


def test_bad_input_is_one_sentence(tool, make_run, tmp_path, capsys):
    good, bare = make_run("mod", "good"), tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "folder.html").mkdir()
    output = tmp_path / "out.html"
    for args, said in [
        ([tmp_path / "none", "--output", output], "no such folder"),
        ([bare, "--output", output], "holds no metrics.jsonl"),
        ([good, "--compare", bare, "--output", output], "bare: not the output folder of a run"),
        ([good / "config.yaml", "--output", output], "not a folder"),
        ([good, "--output", tmp_path / "none" / "out.html"], "no such folder to write out.html into"),
        ([good, "--output", tmp_path / "folder.html"], "is a folder"),
        ([good, "--output", good / "metrics.jsonl"], "ends in .html"),
        ([good, "--output", "/proc/out.html"], "/proc/out.html: cannot be written"),
        ([good, "--output", tmp_path / f"{'x' * 250}.html", "--tokens", 0], "cannot be written"),
        ([good, "--output", output, "--tokens", -1], "must be at least 0"),
        ([good], "required: --output"),
    ]:
        status, out, err = run(tool, capsys, *args)
        assert (status, out) == (2, "")
        *stages, last = err.splitlines()
        assert last.startswith("error: ") and said in last
        assert all(stage.startswith(("reading ", "loading ", "verifying ")) for stage in stages)
    assert not list(tmp_path.glob("*out.html*")) + list(tmp_path.glob(".*"))


def test_a_failed_write_leaves_the_earlier_page(tool, make_run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "a.html"
    output.write_text("earlier")
    good = make_run()

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    status, _, err = run(tool, capsys, good, "--output", output, "--tokens", 0)
    assert status == 2 and "No space left" in err
    assert output.read_text() == "earlier"
    assert not list(tmp_path.glob(".*"))


def test_metrics_alone_need_no_torch(make_run, tmp_path):
    """So a report of metrics, and each refusal, comes at once."""
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, TOOL, make_run(), "--output", tmp_path / "a.html", "--tokens", "0"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
