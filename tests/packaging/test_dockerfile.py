"""The container's recipe, as far as it can be checked without a container engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT

DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, str(path)], capture_output=True, text=True, check=False)


def stages() -> dict[str, str]:
    """The lines of each target."""
    parts = re.split(r"(?m)^FROM \S+ AS (\w+)$", DOCKERFILE.read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_linter_finds_nothing() -> None:
    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("/opt/megadyn", "opt", 1))
    assert "DL3000" in lint(broken).stdout


def test_there_is_a_target_for_cpus_and_one_for_cuda() -> None:
    assert set(stages()) == {"cpu", "cuda"}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_torch_is_installed_first_and_in_the_tested_version(target: str) -> None:
    installs = re.findall(r"pip install [^&\n]*", stages()[target])
    assert "grep '^torch==' requirements.txt" in installs[0]
    assert installs[1].startswith("pip install --requirement requirements.txt")
    assert re.search(r"(?m)^torch==\S+", (ROOT / "requirements.txt").read_text())


def test_what_the_build_needs_is_sent_to_it() -> None:
    """`.dockerignore` leaves out all but what it names; packaging reads these."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    assert sent >= {"LICENSE", "README.md", "ds_configs", "examples", "megadyn", "pyproject.toml", "setup.py"}
