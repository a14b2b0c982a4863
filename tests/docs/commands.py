"""Every command that the documents show, read out of their Markdown, and each checked by the parsers of what it starts.

An indented block holds commands. A fenced one names its language: `sh` is commands too, `yaml`, `python`, `text` and
`{eval-rst}` (what the site takes from docstrings) are not.
In running text a code span of several words is a command if it begins with a program.
"""

import importlib.util
import re
import shlex
import subprocess
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable
from functools import cache, partialmethod
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from deepspeed.launcher.runner import parse_args as parse_deepspeed
from torch.distributed.run import get_args_parser as torchrun_parser

from megadyn.commands import COMMANDS, train
from megadyn.commands.benchmark import BENCHMARKS
from megadyn.errors import Parser
from megadyn.kinds import known_kinds
from tests.helpers.tiny import ROOT

MARKS = ("needs GPUs", "needs several machines", "needs the network")
"""Words in the paragraph before a block, or in a command's comment, that say why no test runs it."""
LANGUAGES = ("sh", "yaml", "python", "text", "{eval-rst}")


class Command(NamedTuple):
    place: str
    """FILE:LINE"""
    settings: dict[str, str]
    """NAME=value before the program."""
    words: list[str]
    is_marked: bool

    @property
    def program(self) -> str:
        """What is started: a script's path from the root, `megadyn.pretrain`, or the first word."""
        return script_of(self.words)[0]

    @property
    def document(self) -> str:
        return self.place.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


class Block(NamedTuple):
    line: int
    language: str
    text: list[str]
    before: str
    """The paragraph before it."""


def read_blocks(text: str) -> list[Block]:
    found: list[Block] = []
    lines, paragraph, at = text.splitlines(), "", 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            end = lines.index("```", at + 1)
            found.append(Block(at + 2, line[3:], lines[at + 1 : end], paragraph))
            at = end
        elif line.startswith("    ") and not lines[at - 1].strip():
            end = next((i for i in range(at, len(lines)) if not lines[i].startswith("    ")), len(lines))
            found.append(Block(at + 1, "sh", [one[4:] for one in lines[at:end]], paragraph))
            at = end - 1
        elif line.strip():
            paragraph = line if not lines[at - 1].strip() else f"{paragraph} {line}"
        at += 1
    return found


def read_commands(name: str, text: str) -> list[Command]:
    """All of one document, in its order."""
    found = []
    for block in read_blocks(text):
        assert block.language in LANGUAGES, (
            f"{name}:{block.line}: a fenced block is one of {LANGUAGES}, not {block.language!r}"
        )
        if block.language == "sh":
            lines = re.sub(r"\\\n\s*", " ", "\n".join(block.text)).splitlines()
            found += [
                as_command(f"{name}:{block.line + i}", line, block.before)
                for i, line in enumerate(lines)
                if line.strip()
            ]
    running = re.sub(
        r"^(```.*?^```| {4}[^\n]*)$", lambda match: re.sub(r"[^\n]", "", match[0]), text, flags=re.M | re.S
    )
    for match in re.finditer(r"`([^`\n]+)`", running):
        line, rest_of_line = (
            running.count("\n", 0, match.start()) + 1,
            running[match.end() :].partition("\n")[0],
        )
        command = as_command(f"{name}:{line}", match[1], rest_of_line)
        is_name = (
            command.program == "megadyn" and len(command.words) == 2
        )  # `megadyn train`: the command, not a call
        if (
            len(command.words) > 1
            and not is_name
            and (command.program in CHECKS or command.program.endswith((".py", ".sh")))
        ):
            found.append(command)
    return found


def as_command(place: str, line: str, around: str) -> Command:
    """`around` is text that may mark it."""
    text, _, comment = line.partition(" #")
    words, settings = shlex.split(text), {}
    while words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
        settings[match[1]] = match[2]
        words.pop(0)
    # pip needs the network by nature
    is_marked = words[:1] == ["pip"] or any(mark in f"{around} {comment}" for mark in MARKS)
    return Command(place, settings, words, is_marked)


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Its program and that program's words: `python tools/x.py a` is tools/x.py with a."""
    if words and words[0] in ("python", ".venv/bin/python"):
        return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    return (words[0], words[1:]) if words else ("", [])


@cache
def load(script: str) -> ModuleType:
    """A script of the repository as a module; as when it is started, it finds the files beside it."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))
        spec.loader.exec_module(module)
    return module


def parse(module: ModuleType, words: list[str], by: str = "parse_args") -> None:
    """By the module's own parser, from its argument or the command line; options in full. Raises what that raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "__init__", partialmethod(ArgumentParser.__init__, allow_abbrev=False))
        patch.setattr("sys.argv", ["program", *words])
        made = getattr(module, by)
        found = made(*[words for _ in signature(made).parameters])
        if by == "make_parser":
            found.parse_args(words)


# ---- A check of each program's words. Each raises, or fails, on what the program would not understand.


def check_tool(command: Command) -> None:
    program, words = script_of(command.words)
    parse(load(program), words)


def check_megadyn(command: Command) -> None:
    """A sub-command's words by its own parser; `train` as the launch scripts ask."""
    name, *words = script_of(command.words)[1]
    if name == "train":
        args = train.parse_args(words)
        check_pretrain([str(args.config), *args.overrides], args.processes)
    elif name == "benchmark":
        parse(importlib.import_module(BENCHMARKS[words[0]]), words[1:])
    else:
        assert name in COMMANDS
        module = importlib.import_module(f"megadyn.commands.{name}")
        parse(module, words, "parse_args" if hasattr(module, "parse_args") else "make_parser")


def check_benchmark(command: Command) -> None:
    _, (what, *options) = script_of(command.words)
    parse(importlib.import_module(BENCHMARKS[what]), options)


def check_pretrain(words: list[str], processes: int | None = None) -> None:
    """The configuration with its overrides, laid out on so many processes, as the launch scripts ask for it."""
    load("tools/check_launch.py").main([*words, *(["--processes", str(processes)] if processes else [])])


def check_alone(command: Command) -> None:
    check_pretrain(script_of(command.words)[1], 1)


def check_deepspeed(command: Command) -> None:
    args = parse_deepspeed(command.words[1:])
    assert args.module and args.user_script == "megadyn.pretrain"
    check_pretrain(args.user_args, args.num_gpus if args.num_gpus > 0 else None)


def check_torchrun(command: Command) -> None:
    args = torchrun_parser().parse_args(command.words[1:])
    assert args.module and args.training_script == "megadyn.pretrain"
    check_pretrain(args.training_script_args, int(args.nproc_per_node))


def check_mpirun(command: Command) -> None:
    _, option, count, *words = command.words
    assert option == "-n"
    if words[0] == "--host":
        assert sum(int(host.partition(":")[2]) for host in words[1].split(",")) == int(count)
        words = words[2:]
    if script_of(words)[0] == "megadyn.pretrain":
        check_pretrain(script_of(words)[1], int(count))
    else:
        check(command._replace(words=words))


def check_make(command: Command) -> None:
    """make itself says what it would run, and a variable that the Makefile does not know is a slip."""
    targets = [word for word in command.words[1:] if "=" not in word]
    for word in set(command.words[1:]) - set(targets):
        assert f"\n{word.partition('=')[0]} ?= " in (ROOT / "Makefile").read_text(), (
            f"{command}: the Makefile has no {word}"
        )
    done = subprocess.run(
        ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and targets, done.stderr


def check_run_script(command: Command) -> None:
    """An example's run.sh: settings that it or the script of its launcher names, and a configuration of its folder."""
    script = Path(command.words[0])
    launcher = ROOT / f"examples/launch/{command.settings.get('LAUNCHER', 'deepspeed')}.sh"
    check_settings(command, (ROOT / script).read_text() + launcher.read_text())
    words = command.words[1:]
    config = words.pop(0) if words and words[0].endswith(".yaml") else "config.yaml"
    check_pretrain([str(ROOT / script.parent / config), *words])


def check_script(command: Command) -> None:
    """Another script of ours: it exists, and names the settings; its words are files and options of what it starts."""
    check_settings(command, (ROOT / command.words[0]).read_text())


def check_settings(command: Command, script: str) -> None:
    for name in command.settings:
        assert re.search(rf"^# .*\b{name}\b", script, re.M), (
            f"{command}: the script's head does not say what {name} is"
        )


def check_pip(command: Command) -> None:
    """No index has megadyn, so it is installed from the clone; an extra is one that pyproject.toml has."""
    _, install, *options, package = command.words
    assert install == "install" and set(options) <= {"--editable"}
    assert not package.startswith("megadyn"), f"{command}: no index has this package"
    if match := re.fullmatch(r"\.\[(\w+)\]", package):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert match[1] in project["optional-dependencies"], f"{command}: no extra {match[1]}"


def check_pytest(command: Command) -> None:
    path = ROOT / command.words[1]
    if command.words[2:3] == ["--kind"]:
        assert (path / "conftest.py").is_file() and command.words[3] in known_kinds()
        return
    assert all(name in path.read_text() for name in command.settings) and command.words[2:3] in ([], ["-k"])


def check_dot(command: Command) -> None:
    """The shell's own: a file that `make` made."""
    assert command.words[1] == ".venv/bin/activate" and "VENV := .venv\n" in (ROOT / "Makefile").read_text()


def check_tail(command: Command) -> None:
    assert (
        command.words[1] == "-n"
        and int(command.words[2]) > 0
        and Path(command.words[3]).name == "metrics.jsonl"
    )


def check_own_arguments(command: Command) -> None:
    """A script without options: a corpus and a folder."""
    program, words = script_of(command.words)
    assert (ROOT / program).is_file() and len(words) == 2


CHECKS: dict[str, Callable[[Command], None]] = {
    "make": check_make,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "mpirun": check_mpirun,
    "pip": check_pip,
    "megadyn.pretrain": check_alone,
    "megadyn": check_megadyn,
    "pytest": check_pytest,
    ".": check_dot,
    "tail": check_tail,
    "tools/benchmark.py": check_benchmark,
    "examples/eval/make_tasks.py": check_own_arguments,
    "examples/study/study.py": check_tool,
    "examples/study/grid.py": check_tool,
    "examples/study/gate.py": check_tool,
    "examples/probe/probe.py": check_tool,
    "examples/eval/run.sh": check_script,
    "examples/eval/longbench.sh": check_script,
    "benchmarks/gpu.sh": check_script,
}
"""By program; tools and run.sh of the examples beside these."""


def check(command: Command) -> None:
    """Fails unless each program that the command starts understands its words."""
    program = command.program
    if program in CHECKS:
        CHECKS[program](command)
    elif re.fullmatch(r"tools/\w+\.py", program):
        check_tool(command)
    elif re.fullmatch(r"examples/\w[\w.]*/run\.sh", program):
        check_run_script(command)
    else:
        pytest.fail(f"{command}: tests/docs/commands.py does not know how to check {program}")
