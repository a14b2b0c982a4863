"""transformers' own model tests: fetched as the source archive of the installed version, never copied into the project."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(sys.prefix) / "transformers-source"
"""Inside the virtual environment: ignored by git, and gone with it."""


def tests_folder() -> Path:
    """Where the tests of the installed version lie, if they have been fetched."""
    return CACHE / f"transformers-{version('transformers')}" / "tests"


def fetch() -> Path:
    """Downloads and unpacks the source archive unless it is here already. CalledProcessError if pip cannot get it."""
    folder = tests_folder()
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    wanted = f"transformers=={version('transformers')}"
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--no-binary", "transformers", "--dest", str(CACHE), wanted],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=300)
    archive = CACHE / f"{folder.parent.name}.tar.gz"
    unpacked = CACHE / f".unpacking-{folder.parent.name}"
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(f"{folder.parent.name}/tests/")]
        tar.extractall(unpacked, members, filter="data")
    (unpacked / folder.parent.name).rename(folder.parent)
    unpacked.rmdir()
    archive.unlink()
    return folder


if __name__ == "__main__":
    print(fetch())
