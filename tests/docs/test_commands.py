"""Every command in the documents: understood by what it starts, and run by a test unless the text says why it is not."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_args as parse_deepspeed

from megadyn.commands import main as megadyn
from megadyn.commands.train import parse_args as parse_train
from megadyn.config import Config, load_config
from megadyn.errors import UserError
from megadyn.kinds import find_kind, keys_of, known_kinds
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from tests.docs.commands import (
    MARKS,
    Block,
    Command,
    as_command,
    check,
    load,
    read_blocks,
    read_commands,
    script_of,
)
from tests.helpers.crew import Crew
from tests.helpers.published import write_models
from tests.helpers.tiny import ROOT

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/LOG.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("README.md")),
]
GENERATED = ROOT / "docs/generated/configuration.md"
"""Made when the site is built; `test_reference.py` looks at it."""
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
COMMANDS = [command for name, text in TEXTS.items() for command in read_commands(name, text)]

RUN_BY = {
    "make": "tests/docs/test_commands.py::test_the_quickstart_takes_the_steps_that_are_tested_here",
    ".": "tests/docs/test_commands.py::test_the_quickstart_takes_the_steps_that_are_tested_here",
    "pytest": "tests/end_to_end/test_deaths.py::test_killed_anywhere_the_run_ends_with_the_same_weights",
    "tail": "tests/end_to_end/test_pretrain.py::losses",
    "examples/quickstart/run.sh": "tests/docs/test_commands.py::test_the_quickstart_takes_the_steps_that_are_tested_here",
    "examples/study/study.py": "tests/docs/test_commands.py::test_the_studys_runs_can_be_loaded",
    "examples/study/grid.py": "tests/examples/test_grid.py",
    "examples/study/gate.py": "tests/examples/test_gate.py",
    "examples/study/make_corpus.py": "tests/examples/test_grid.py",
    "examples/probe/probe.py": "tests/examples/test_probe.py",
    "examples/eval/run.sh": "tests/hf/test_lm_eval.py::scores",
    "examples/eval/make_tasks.py": "tests/hf/test_lm_eval.py::workplace",
    "tools/benchmark.py data": "tests/benchmark/test_preparation.py",
    "tools/benchmark.py samples": "tests/benchmark/test_samples.py",
    "tools/benchmark.py step": "tests/benchmark/test_step.py",
    "tools/benchmark.py layer": "tests/benchmark/test_layer.py",
    "tools/benchmark.py bytes": "tests/benchmark/test_bytes.py",
    "tools/benchmark.py generate": "tests/benchmark/test_generate.py",
    "tools/benchmark.py checkpoint": "tests/benchmark/test_checkpoint.py",
    "tools/benchmark.py engine": "tests/benchmark/test_gpu_script.py::test_what_starts_processes_runs_on_a_bare_host",
    "tools/benchmark.py scaling": "tests/benchmark/test_scaling.py",
    "tools/benchmark.py soak": "tests/benchmark/test_soak.py",
    "tools/benchmark.py flips": "tests/benchmark/test_flips.py",
}
RUN_BY |= {
    key.replace("tools/benchmark.py", "megadyn benchmark"): test
    for key, test in RUN_BY.items()
    if key.startswith("tools/benchmark.py")
} | {
    "megadyn completion": "tests/commands/test_completion.py",
    "megadyn average": "tests/checkpoint/test_averaging.py",
}
"""Which test runs the programs of unmarked commands that are not run below: a file, or a function of it."""

WITHOUT_TORCH = [
    f"tools/{name}.py" for name in ("train_tokenizer", "preprocess_data", "inspect_dataset", "merge_datasets")
] + [f"megadyn {name}" for name in ("tokenizer", "preprocess", "inspect", "merge")]
"""Started as processes of their own, which takes little and lets them fork theirs; others run in this one."""


NOT_HERE = ("tools/benchmark.py", "megadyn benchmark", "megadyn completion", "megadyn average")


def is_run_here(command: Command) -> bool:
    """What takes a second or two on a tiny run."""
    program = key_of(command)
    return (
        not command.is_marked
        and not program.startswith(NOT_HERE)
        and program.startswith(("tools/", "megadyn ", "megadyn.pretrain", "deepspeed"))
    )


def key_of(command: Command) -> str:
    """Its program; with the sub-command of `megadyn`, and with what a benchmark measures."""
    program, words = script_of(command.words)
    parts = {"tools/benchmark.py": 1, "megadyn": 2 if words[:1] == ["benchmark"] else 1}.get(program, 0)
    return " ".join([program, *words[:parts]])


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root after `make quickstart`, with files of the names that the documents use."""
    folder = tmp_path_factory.mktemp("root")
    run = folder / "runs/quickstart"
    for path in (
        run / "corpus/train.jsonl",
        folder / "corpus/train/a.jsonl",
        run / "corpus/validation.jsonl",
        folder / "corpus/validation/b.jsonl",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [
            source.read_text()
            for source in sorted((ROOT / "megadyn/data").glob("*.py"))
            if source.stat().st_size > 5000  # any one of them is enough for a sample
        ]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:6]))
    for name in ("runs/quickstart/data/train", "runs/quickstart/data/validation", "data/a", "data/b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        preprocess(Corpus([run / "corpus/train.jsonl"]), "byte", folder / name, append_eod=True)
    (folder / "hosts").write_text("node0 slots=8\nnode1 slots=8\n")
    for name in ("tools", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "examples/quickstart").mkdir(parents=True)
    for path in (ROOT / "examples").iterdir():
        if path.name != "quickstart":
            (folder / "examples" / path.name).symlink_to(path)
    small = "\n".join(
        [
            f"extends: {ROOT}/examples/quickstart/config.yaml",
            "tokenizer: {path: byte}",
            "model: {hidden_size: 32, num_layers: 4, num_heads: 4, num_kv_heads: 2, ffn_size: 64}",
            "training: {iterations: 2, global_batch_size: 8, micro_batch_size: 1, eval_samples: 2, eval_interval: 0}",
            "logging: {interval: 1, tensorboard: false}",
            "optimizer: {warmup_iterations: 1}",
        ]
    )
    (folder / "examples/quickstart/config.yaml").write_text(small)
    (folder / "CONFIG.yaml").write_text(small + "\noutput_dir: runs/alone\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        crew = Crew(folder / "CONFIG.yaml", "output_dir=runs/quickstart")
        assert crew.wait() == [0], crew.output()
    return folder


@pytest.fixture
def root(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Works in `finished_run`; what a test adds to it stays."""
    write_models(finished_run)
    monkeypatch.chdir(finished_run)
    environment = dict(os.environ)
    yield finished_run
    os.environ.clear()
    os.environ.update(environment)  # tools and parsers set some


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place} {command.program}")
def test_each_command_is_understood(command: Command, root: Path) -> None:
    check(command)


def test_each_command_is_run_by_a_test_or_says_what_it_needs() -> None:
    for command in COMMANDS:
        if command.is_marked or is_run_here(command):
            continue
        key = key_of(command)
        assert key in RUN_BY, f"{command}: no test runs it (RUN_BY), and the text has none of {MARKS}"
        file, _, function = RUN_BY[key].partition("::")
        assert f"def {function or 'test_'}" in (ROOT / file).read_text(), RUN_BY[key]


@pytest.mark.parametrize(
    "document", sorted({command.document for command in COMMANDS if is_run_here(command)})
)
def test_commands_run_one_after_another(
    document: str, finished_run: Path, tmp_path: Path, root: Path
) -> None:
    """In the document's order, as they stand there (but the quickstart's model is tiny), each once; all end with status 0."""
    os.chdir(shutil.copytree(finished_run, tmp_path / "root", symlinks=True))
    done: list[list[str]] = []
    for command in COMMANDS:
        if command.document == document and is_run_here(command) and command.words not in done:
            run(command)
            done.append(command.words)


def run(command: Command) -> None:
    program, words = script_of(command.words)
    if program == "deepspeed":
        args = parse_deepspeed(words)
        train(command, args.user_args, args.num_gpus)
    elif program == "megadyn.pretrain":
        train(command, words, 1)
    elif key_of(command) == "megadyn train":
        args = parse_train(words[1:])
        train(command, [str(args.config), *args.overrides], args.processes or 1)
    elif key_of(command) in WITHOUT_TORCH:
        start = ["-m", program] if program == "megadyn" else [program]
        done = subprocess.run(
            [sys.executable, *start, *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    elif program == "megadyn":
        assert megadyn(words) == 0, command
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [program, *words])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(program, run_name="__main__")
        assert not ended.value.code, command


def train(command: Command, words: list[str], world: int) -> None:
    crew = Crew(Path(words[0]), *words[1:], world=world)
    assert crew.wait() == [0] * world, f"{command}: {crew.output()}"


def test_the_quickstart_takes_the_steps_that_are_tested_here(root: Path, tmp_path: Path) -> None:
    """make hands the layout on, and the script's commands, taken down by stand-ins, are understood."""
    said = subprocess.run(
        ["make", "-n", "quickstart", "PIPELINE=2"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "TENSOR=2 PIPELINE=2 DATA=1 examples/quickstart/run.sh" in said
    assert "-m venv .venv" in (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    for name in ("python", "deepspeed"):
        (tmp_path / name).write_text(
            f'#!/bin/bash\nprintf -v line " %q" {name} "$@"; echo "$line" >>"$TAKEN_DOWN"\n'
        )
        (tmp_path / name).chmod(0o755)
    taken_down = tmp_path / "commands"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PIPELINE": "2",
        "TAKEN_DOWN": str(taken_down),
    }
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(
        [ROOT / "examples/quickstart/run.sh", "training.iterations=3"],
        cwd=work,
        env=environment,
        capture_output=True,
        check=True,
    )
    commands = [as_command("run.sh", line, "") for line in taken_down.read_text().splitlines()]
    assert [
        " ".join([Path(command.program).name, *script_of(command.words)[1][: command.program == "megadyn"]])
        for command in commands
    ] == [
        "make_corpus.py",
        "megadyn tokenizer",
        "megadyn preprocess",
        "megadyn preprocess",
        "deepspeed",
        "megadyn export",
        "megadyn evaluate",
        "megadyn generate",
        "summarize.py",
    ]
    assert commands[4].words[-4:] == [
        str(ROOT / "examples/quickstart/config.yaml"),
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "training.iterations=3",
    ]
    for command in commands:
        if not command.program.startswith(str(ROOT / "examples/quickstart/")):
            check(command)


def test_the_studys_runs_can_be_loaded(root: Path) -> None:
    study = load("examples/study/study.py")
    for name in study.MODELS:
        path, *words = study.command(name, 1, Path("runs/study"), ["training.iterations=3"])
        assert load_config(path, words).training.iterations == 3


@pytest.mark.parametrize(
    ("name", "block"),
    [
        (name, block)
        for name, text in TEXTS.items()
        for block in read_blocks(text)
        if block.language in ("yaml", "python")
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_blocks_are_what_they_say(name: str, block: Block, root: Path, tmp_path: Path) -> None:
    if block.language == "python":
        compile("\n".join(block.text), name, "exec")
        return
    path = tmp_path / "block.yaml"
    is_whole = any(line.startswith("output_dir:") for line in block.text)
    rest = [] if is_whole else [f"extends: {ROOT}/examples/study/config.yaml", "output_dir: unused"]
    path.write_text("\n".join([*rest, *block.text]))
    load_config(path, ["data.validation=null"] if "split:" in "".join(block.text) else [])


def test_each_key_that_a_document_names_exists() -> None:
    sections = "|".join(field.name for field in fields(Config) if is_dataclass(field.default_factory))
    found = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:[=:] ?[^`]*)?`", "\n".join(TEXTS.values()))
    found = [key for key in found if not key.endswith((".json", ".md"))]
    assert len(set(found)) > 40
    of_kinds = {key for kind in known_kinds() for key in keys_of(find_kind(kind))}
    for key in found:
        section = Config()
        if key.startswith("model.routing."):
            assert key.removeprefix("model.routing.") in of_kinds, key
            continue
        for name in key.split("."):
            assert hasattr(section, name), key
            section = getattr(section, name)


def test_each_file_that_a_document_links_to_exists() -> None:
    for name, text in TEXTS.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            path = (ROOT / name).parent / target if target else ROOT / name
            if path == GENERATED:
                continue
            assert path.exists(), f"{name}: {target}"
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {
                re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings
            }, anchor


@pytest.mark.parametrize(
    "text",
    [
        "    python tools/plan_run.py examples/dtf_3b/config.yaml --gpus 8 --memory 80",
        "    python tools/benchmark.py step --model dense --rounds 1",
        "    python tools/benchmark.py steps",
        "    deepspeed --processes 8 --module megadyn.pretrain CONFIG.yaml",
        "    torchrun --nproc_per_node 8 -m megadyn.pretrain CONFIG.yaml parallel.tensors=2",
        "    mpirun -n 3 python -m megadyn.pretrain CONFIG.yaml parallel.tensor=2",
        "    make quickstart TENSORS=2",
        "    make quick",
        "    HOSTS=hosts examples/dtf_3b/run.sh",
        "    examples/dtf_3b/run.sh huge.yaml",
        "    megadyn train CONFIG.yaml --processes 3 parallel.tensor=2",
        "    megadyn evaluate --checkpoint x",
        "    megadyn trian CONFIG.yaml",
        "    megadyn benchmark steps",
        "    megadyn new quickstart --folder x",
        "    pip install megadyn[fast]",
        '    pip install --editable ".[faster]"',
        "See `tools/evaluate.py --checkpoint x --dataset y`.",
        "    curl https://example.org",
        "```sh\npython tools/no_such_tool.py\n```",
    ],
)
def test_a_command_that_would_fail_is_found(text: str, root: Path) -> None:
    (command,) = read_commands("x", f"\n{text}\n")
    with pytest.raises((UserError, AssertionError, SystemExit, KeyError, OSError, pytest.fail.Exception)):
        check(command)


def test_marks_and_settings_are_read() -> None:
    text = (
        'This needs\nGPUs. Not the last:\n\n    A=1 B="x y" make test   # why\n    make x \\\n      y   # needs the '
        "network\n\nAgain `make z`.\n"
    )
    first, second, third = read_commands("x", text)
    assert (first.settings, first.words, first.place) == ({"A": "1", "B": "x y"}, ["make", "test"], "x:4")
    assert [first.is_marked, second.is_marked, third.is_marked] == [True, True, False]
    (called,) = read_commands("x", "\n`megadyn train` trains, `megadyn new mod` copies.\n")
    assert called.words == ["megadyn", "new", "mod"]
    assert (second.words, third.words) == (["make", "x", "y"], ["make", "z"])
