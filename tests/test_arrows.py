"""Imports point down: a room knows only what stands below it, and few rooms know DeepSpeed or torch.distributed."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megadyn"
ROOMS = ("benchmark", "pretrain", "report", "training", "checkpoint", "hf", "network", "routing", "model", "kernels", "parallel",
         "data", "planning", "config", "paths", "errors", "log")
"""Highest first. `errors` and `log` stand side by side on the ground."""
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(source: str, package: str) -> Iterator[str]:
    """Full names of all modules and members imported anywhere in `source`, but for those under `if TYPE_CHECKING`.

    `torch.distributed`, which `import torch` brings along, counts where it is used.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:-(node.level - 1) or None] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"
        waiting += ast.iter_child_nodes(node)


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    return set(imported(path.read_text(), package))


def uses(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


def where(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def users(module: str) -> set[str]:
    return {where(path) for path in FILES if uses(imports_of(path), module)}


def test_the_reader_of_imports_sees_every_form_and_spares_type_checking():
    source = """
import a.b as c
from . import d
from .e import f
from ..g import h
if TYPE_CHECKING:
    import unseen
else:
    import seen
def function():
    from i import j
    torch.distributed.barrier()
"""
    assert set(imported(source, "top.room")) == {"a.b", "top.room.d", "top.room.e.f", "top.g.h", "seen", "i.j",
                                                "torch.distributed"}


def test_every_file_stands_in_a_room():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == set(ROOMS)


def test_imports_point_down():
    wrong = []
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in sorted(imports_of(path)):
            if not name.startswith("megadyn."):
                continue
            target = name.split(".")[1]
            down = target in ROOMS and ROOMS.index(target) > ROOMS.index(room)
            if target != room and (not down or room in ("errors", "log")):
                wrong.append(f"{where(path)} imports {name}")
    assert not wrong


def test_few_files_know_deepspeed():
    assert users("deepspeed") == {"training/engine.py", "training/pipeline.py", "training/launch.py", "checkpoint/save_load.py"}


def test_few_rooms_know_torch_distributed():
    rooms = {name.split("/")[0] for name in users("torch.distributed")}
    assert rooms <= {"parallel", "training", "checkpoint", "pretrain.py"}
    assert "parallel" in rooms


def test_data_needs_no_torch():
    assert not {name for name in users("torch") if name.startswith("data/")}


def test_the_exported_modelling_files_need_nothing_of_megadyn_but_each_other():
    for name in ("modeling_megadyn.py", "configuration_megadyn.py"):
        ours = {name for name in imports_of(PACKAGE / "hf" / name) if uses({name}, "megadyn")}
        assert all(name.startswith("megadyn.hf.configuration_megadyn.") for name in ours), ours
