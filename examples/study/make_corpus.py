"""Writes text that is on this machine as two JSONL corpora: Python's library and packages, and their documentation.

    python examples/study/make_corpus.py FOLDER [--also DIR ...] [--least 100]

A project is a package of Python, or a folder below DIR (default: `/usr/share/doc`, what a distribution installs). One
document per file. Files with the same words are taken once, and of no project more than a tenth of `--least`. Every
25th project, by a hash of its name, is kept for validation, of each at most a hundredth; no project is in both. Text
differs between machines: compare losses only between runs on one corpus, whose hash is printed.
"""

import argparse
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megadyn.arguments import positive
from megadyn.errors import Parser, UserError, run_tool
from megadyn.paths import user_path

ENDINGS = (".py", ".md", ".rst", ".txt", ".html", ".gz")
LARGEST = 400_000
"""Bytes of a file, above which it is data rather than text."""
SMALLEST = 200
LEFT_OUT = ("changelog", "copyright", "license", "licence", "notice", "record", "top_level")
"""Beginnings of names of files that say the same in every project."""
FOLDERS_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
HELD_OUT = 25
SHARE, SHARE_HELD_OUT = 0.1, 0.01
"""Of `least`: how much a project may give."""


def files_of(root: Path) -> Iterator[tuple[str, Path]]:
    """Project and path of every file of text below `root`, in an order that depends on names alone."""
    for path in sorted(root.rglob("*")):
        if FOLDERS_LEFT_OUT & set(path.relative_to(root).parts):
            continue
        if path.suffix in ENDINGS and not path.name.lower().startswith(LEFT_OUT) and path.is_file():
            yield f"{root.name}/{path.relative_to(root).parts[0]}", path


def text_of(path: Path) -> str | None:
    """What the file holds, if that is text of a length that is worth it."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    return text if SMALLEST <= len(data) <= LARGEST else None


def documents_of(roots: Sequence[Path], least: int) -> Iterator[tuple[str, str]]:
    """Project and text of each document, for `least` million characters."""
    seen: set[bytes] = set()
    taken: dict[str, int] = {}
    for root in roots:
        for project, path in files_of(root):
            most = (SHARE_HELD_OUT if is_held_out(project) else SHARE) * least * 1e6
            if taken.get(project, 0) >= most or (text := text_of(path)) is None:
                continue
            words = hashlib.sha256(" ".join(text.split()).encode()).digest()
            if words not in seen:
                seen.add(words)
                taken[project] = taken.get(project, 0) + len(text)
                yield project, text


def is_held_out(project: str) -> bool:
    return hashlib.sha256(project.encode()).digest()[0] % HELD_OUT == 0


def write(folder: Path, roots: Sequence[Path], least: int) -> str:
    """Writes both corpora; returns their hash. Raises UserError for less than `least` million characters."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {part: folder / f"{part}.jsonl" for part in ("train", "validation")}
    found, whole = dict.fromkeys(names, 0), hashlib.sha256()
    temporary = {part: path.with_name(f".{path.name}.tmp") for part, path in names.items()}
    with temporary["train"].open("w") as train, temporary["validation"].open("w") as validation:
        for project, text in documents_of(roots, least):
            part = "validation" if is_held_out(project) else "train"
            line = json.dumps({"text": text, "project": project}) + "\n"
            (train if part == "train" else validation).write(line)
            whole.update(line.encode())
            found[part] += len(text)
    if sum(found.values()) < least * 1e6 or not min(found.values()):
        for path in temporary.values():
            path.unlink()
        raise UserError(
            f"{sum(found.values()) / 1e6:.0f} MB of text below {', '.join(map(str, roots))}: must be at least {least}, of "
            "several projects; name more folders with --also"
        )
    for part, path in reversed(names.items()):  # the first is there only if both are
        temporary[part].rename(path)
        print(f"{path}: {found[part] / 1e6:.1f} MB")
    return whole.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, metavar="FOLDER")
    parser.add_argument("--also", type=user_path, nargs="+", default=[Path("/usr/share/doc")], metavar="DIR")
    parser.add_argument(
        "--least", type=positive, default=100, metavar="MB", help="of text, or it is an error"
    )
    args = parser.parse_args(argv)
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), Path(paths["purelib"]), *args.also]
    print(f"sha256 {write(args.folder, [root for root in roots if root.is_dir()], args.least)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
