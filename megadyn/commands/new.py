"""Copy an example into a subfolder of the current one: its configurations, the files that they extend, and its run script.

Without NAME, list the examples. Start the copy from the current folder: relative paths in a configuration (datasets,
tokenizer, output folder) are relative to the working directory.

    megadyn new dtf_50m
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megadyn.arguments import command_parser
from megadyn.config.file import config_layers
from megadyn.errors import Parser, UserError, did_you_mean
from megadyn.files import executable, os_errors_named, temporary_beside
from megadyn.paths import user_path

EXAMPLES = Path(__file__).parents[1] / "examples"
"""In a checkout this is a link to the top-level folder."""
SHARED = ("bases", "launch")
"""Folders shared by the examples; a copy gets its own copies of their files."""
COPIED = ("*.yaml", "*.sh", "*.py")


def make_parser() -> Parser:
    parser = command_parser("new", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="an example; the list shows them")
    parser.add_argument("--output", type=user_path, metavar="DIR", help="folder to create (default: NAME)")
    return parser


def examples() -> dict[str, str]:
    """Name -> description, the first line of its configuration."""
    found = {}
    for script in sorted(EXAMPLES.glob("*/run.sh")):
        main_file, files = script.with_name("config.yaml"), sorted(script.parent.glob("*.yaml"))
        if main_file in files:
            found[script.parent.name] = main_file.read_text().splitlines()[0].removeprefix("# ")
        elif files:
            found[script.parent.name] = f"Several configurations: {', '.join(path.name for path in files)}."
    return found


def copy_example(name: str, target: Path) -> list[str]:
    """Copies an example and returns the names of the files in `target`, which appears only when complete. Raises UserError."""
    if name not in (known := examples()):
        raise UserError(f"{name}: no such example{did_you_mean(name, known)}; `megadyn new` lists them")
    if target.exists():
        raise UserError(f"{target} exists already; name another folder with --output")
    copies = files_of(EXAMPLES / name)
    with os_errors_named(target):
        made = temporary_beside(target)
        try:
            for path, copy in copies.items():
                write_copy(path, made / copy)
            made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return sorted(copies.values())


def files_of(example: Path) -> dict[Path, str]:
    """Each file that an example needs -> its path in a copy."""
    own = [path for pattern in COPIED for path in sorted(example.glob(pattern))]
    layers = [file for path in own if path.suffix == ".yaml" for file, _ in config_layers(path)]
    launchers = EXAMPLES.glob("launch/*.sh") if "../launch/" in (example / "run.sh").read_text() else ()
    shared = [*(path.resolve() for path in layers), *launchers]
    return {path: path.name for path in own} | {
        path: f"{path.parent.name}/{path.name}"
        for path in shared
        if path.parent.name in SHARED and path.name != "run.sh"
    }


def write_copy(path: Path, copy: Path) -> None:
    text = path.read_text()
    for folder in SHARED:
        text = text.replace(f"../{folder}/", f"{folder}/")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text)
    if path.suffix == ".sh":
        executable(copy)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.name is None:
        known = examples()
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {text}" for name, text in known.items()))
        return 0
    target = args.output or Path(args.name)
    names = copy_example(args.name, target)
    print(f"{target}: {', '.join(names)}")
    print(f"start it with {target}/run.sh [key=value ...]; the comments at its top list its settings")
    return 0
