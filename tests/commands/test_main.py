"""The console command: what it lists, what it loads, and its answers to slips."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megadyn import __version__
from megadyn.commands import COMMANDS, main
from megadyn.commands.benchmark import BENCHMARKS
from megadyn.config import load_config, resolved_config
from tests.helpers.tiny import ROOT

SCREEN = 50
"""Lines."""


def megadyn(*words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megadyn", *map(str, words)],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_all_commands_on_a_screen_and_loads_nothing_large(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= 110
    assert [
        line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in COMMANDS
    ] == list(COMMANDS)
    code = "import sys; from megadyn.commands import main; main(['--help']); print(*sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"torch", "numpy", "omegaconf", "transformers", "deepspeed", "shtab"}
    assert took < 5  # a fifth of a second alone; other tests run beside this one


def test_no_word_shows_the_same_and_the_version_is_the_packages(capsys):
    main([])
    without = capsys.readouterr().out
    main(["-h"])
    assert capsys.readouterr().out == without
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megadyn {__version__}\n"


@pytest.mark.parametrize(
    ("word", "suggested"),
    [("trian", "train"), ("evalute", "evaluate"), ("reports", "report"), ("xyzzy", None)],
)
def test_a_slip_is_one_sentence_with_a_suggestion(capsys, word, suggested):
    assert main([word]) == 2
    meant = f" (did you mean '{suggested}'?)" if suggested else ""
    assert (
        capsys.readouterr().err == f"error: '{word}': no such command{meant}; `megadyn --help` lists them\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_that_ends_with_an_example(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: megadyn {name}")
    assert len(text.splitlines()) <= SCREEN
    *_, examples = text.partition("\nexample")
    lines = examples.splitlines()[1:]
    assert lines and all(line.startswith("    ") for line in lines)
    assert f"megadyn {name}" in lines[0]


def test_scripts_in_tools_start_the_same_and_call_themselves_by_their_names():
    for path in sorted((ROOT / "tools").glob("*.py")):
        assert len(path.read_text().splitlines()) < 40, path
    done = subprocess.run(
        [sys.executable, "tools/merge_datasets.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: merge_datasets.py")
    assert "    python tools/merge_datasets.py --inputs data/a data/b" in done.stdout
    assert "megadyn merge" not in done.stdout


def test_config_show_is_what_a_run_would_save(tmp_path):
    path, words = "examples/study/config.yaml", ["model.vocab_size=512", "training.iterations=3"]
    done = megadyn("config", "show", path, *words)
    assert done.returncode == 0, done.stderr
    assert OmegaConf.to_container(OmegaConf.create(done.stdout)) == resolved_config(
        load_config(ROOT / path, words)
    )
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert resolved_config(load_config(tmp_path / "again.yaml")) == resolved_config(
        load_config(ROOT / path, words)
    )


def test_config_keys_names_type_default_and_text(capsys):
    assert main(["config", "keys", "training.spike_factor"]) == 0
    head, text = capsys.readouterr().out.split("\n", 1)
    assert head == "training.spike_factor  (number, default 0.0)"
    assert text.startswith("    ") and len(text) > 30
    assert main(["config", "keys", "data.train"]) == 0
    assert capsys.readouterr().out.startswith("data.train  (any, required)\n")


def test_train_refuses_once_what_no_rank_could_run(capsys, monkeypatch, tmp_path):
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text("data: {train: x}\ntokenizer: {path: byte}\noutput_dir: y\ntraining: {iterations: 1}\n")
    assert main(["train", str(path), "--processes", "3", "parallel.tensor=2"]) == 2
    assert "number of processes = 3: must be a multiple of" in capsys.readouterr().err
    assert main(["train", str(path), "--processes", "2", "deepspeed_config=none.json"]) == 2
    assert "deepspeed_config = 'none.json'" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(["train", str(path), "--processes", "2"]) == 2
    assert "if a launcher" in capsys.readouterr().err
    assert not started


def test_every_module_of_the_package_is_a_command():
    folder = Path(import_module("megadyn.commands").__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(COMMANDS)


def test_each_benchmark_shows_how_it_is_started():
    for name, module in BENCHMARKS.items():
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f'command_parser("benchmark {name}", __doc__)' in text
        assert f"    megadyn benchmark {name}" in text.split('"""')[1]


def test_a_benchmark_that_is_ended_leaves_by_way_of_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whatever ends its processes is run."""

    class Benchmark:
        @staticmethod
        def main(_words: list[str]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    monkeypatch.setattr("megadyn.commands.benchmark.import_module", lambda name: Benchmark)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"):
            main(["benchmark", "samples"])
    finally:
        signal.signal(signal.SIGTERM, before)
