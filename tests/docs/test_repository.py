"""What the repository says about itself, and what its workflows run, is there."""

import os
import re
from pathlib import Path

import pytest
import yaml

import megadyn
from tests.helpers.tiny import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_the_citation_is_of_this_version_and_license() -> None:
    cited = read(ROOT / "CITATION.cff")
    assert cited["version"] == megadyn.__version__
    assert cited["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_changelog_has_this_version() -> None:
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[:2] == ["Unreleased", megadyn.__version__]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_and_scripts_that_exist(path: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    steps = [step for job in read(path)["jobs"].values() for step in job["steps"]]
    commands = [line for step in steps for line in step.get("run", "").splitlines()]
    assert commands
    for command in commands:
        program, *words = command.split()
        if program == "make":
            assert words and set(words) <= set(targets), command
        elif "/" in program and "fresh" not in program:
            assert os.access(ROOT / program, os.X_OK), command
    for step in steps:
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "actions/x@v1"))


def test_ci_workflows_cover_check_docs_and_wheel() -> None:
    assert [path.stem for path in WORKFLOWS] == ["check", "docs", "wheel"]


def test_hooks_use_tools_of_the_development_requirements() -> None:
    pinned = "".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    for hook in hooks:
        tool = re.match(r"\.venv/bin/(\w+)", hook["entry"])[1]
        assert re.search(rf"^{tool}(-py)?==", pinned, re.M), hook["id"]
