"""The package as a wheel, installed where the source tree cannot be imported: from a folder of text to a report and an export."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from megadyn import __version__
from tests.helpers.tiny import ROOT

PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "megadyn", "ds_configs", "examples")
CONFIG = """
model: {hidden_size: 32, num_layers: 4, num_heads: 4, num_kv_heads: 2, ffn_size: 64, routing: {kind: dtf}}
data: {train: data/train, validation_fraction: 0.2}
tokenizer: {path: byte}
training: {iterations: 2, global_batch_size: 4, sequence_length: 48, eval_samples: 4}
optimizer: {warmup_iterations: 1}
logging: {interval: 1, tensorboard: false}
parallel: {tensor: 2}
precision: fp32
deepspeed_config: zero0
output_dir: run
"""


def call(words: list[object], folder: Path) -> str:
    """What it prints. The environment leads to no source tree."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source, so that nothing is left in it."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", source / "wheels"]
    call([sys.executable, "-m", "pip", "wheel", *options, source], source)
    (built,) = (source / "wheels").iterdir()
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of a fresh environment with the wheel. It sees the packages of this one, but no editable megadyn."""
    folder = tmp_path_factory.mktemp("environment")
    call([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin/python"
    place = Path(
        call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    )
    (place / "others.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    call([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], folder)
    return folder / "bin"


def test_the_wheel_holds_the_package_and_what_it_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("megadyn/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megadyn").rglob("*.py")}
    modules |= {f"megadyn/{path.relative_to(ROOT)}" for path in (ROOT / "examples/quickstart").glob("*.py")}
    assert modules <= held and wheel.name.startswith(f"megadyn-{__version__}-")
    others = {name for name in held if not name.endswith(".py")}
    expected = {"megadyn/py.typed", "megadyn/report/page.css", "megadyn/report/page.js"}
    expected |= {f"megadyn/{path.relative_to(ROOT)}" for path in (ROOT / "ds_configs").iterdir()}
    expected |= {f"megadyn/{path.relative_to(ROOT)}" for path in (ROOT / "examples").glob("*/*.yaml")}
    expected |= {f"megadyn/{path.relative_to(ROOT)}" for path in (ROOT / "examples").glob("*/*.sh")}
    expected |= {f"megadyn/{path.relative_to(ROOT)}" for path in (ROOT / "examples/eval/tasks").iterdir()}
    assert others == expected


def test_text_to_report_and_export_from_another_folder(programs: Path, tmp_path: Path) -> None:
    megadyn = programs / "megadyn"
    found = call([programs / "python", "-c", "import megadyn; print(megadyn.__file__)"], tmp_path)
    assert Path(found.strip()).is_relative_to(programs.parent)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in (ROOT / "megadyn/data").glob("*.py"):
        (corpus / path.name).write_text(path.read_text())
    (tmp_path / "config.yaml").write_text(CONFIG)

    prefix = ["--output-prefix", "data/train", "--append-eod"]
    call([megadyn, "preprocess", "--input", "corpus", "--tokenizer", "byte", *prefix], tmp_path)
    call([megadyn, "train", "config.yaml", "--processes", 2, "training.iterations=3"], tmp_path)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if "lm_loss" in record] == [1, 2, 3]

    call([megadyn, "export", "--checkpoint", "run", "--output", "hf"], tmp_path)
    said = call(
        [megadyn, "evaluate", "--checkpoint", "hf", "--data", "data/train", "--samples", 4, "--json"],
        tmp_path,
    )
    assert json.loads(said.splitlines()[-1])["topk"] > 0
    call([megadyn, "report", "run", "--output", "report.html", "--tokens", 20], tmp_path)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    call([megadyn, "new", "dtf_50m"], tmp_path)
    shown = call([megadyn, "config", "show", "dtf_50m/config.yaml"], tmp_path)
    assert "deepspeed_config: zero1" in shown
