"""transformers' own model tests: fetched as the source archive of the installed version, never copied into the project."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from megadyn.errors import UserError, run_tool

CACHE = Path(sys.prefix) / "transformers-source"
"""Inside the virtual environment: ignored by git, and gone with it."""


def own_tests() -> Path:
    """Where the tests of the installed version lie, if they have been fetched."""
    return CACHE / f"transformers-{version('transformers')}" / "tests"


def fetch() -> Path:
    """Downloads and unpacks the source archive unless it is here already. UserError if pip cannot get it."""
    folder = own_tests()
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    download(f"transformers=={version('transformers')}")
    name = folder.parent.name
    archive, unpacked = CACHE / f"{name}.tar.gz", CACHE / f".unpacking-{name}"
    with tarfile.open(archive) as tar:
        tar.extractall(
            unpacked, [member for member in tar if member.name.startswith(f"{name}/tests/")], filter="data"
        )
    (unpacked / name).rename(folder.parent)
    unpacked.rmdir()
    archive.unlink()
    return folder


def download(requirement: str) -> None:
    """The source archive of `requirement` into CACHE."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        "transformers",
        "--dest",
        str(CACHE),
        requirement,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no message"])[-1]
        raise UserError(f"pip could not download the source archive of {requirement}: {reason}")


def main() -> int:
    print(fetch())
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
