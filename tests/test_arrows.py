"""Imports point down: a room knows only what stands below it, and few rooms know DeepSpeed or torch.distributed.

A folder of `megadyn/kinds` has files in three rooms: its record (`__init__.py`), its layers for training, and `exported.py`,
which is shipped beside exported weights. Nobody but the folder itself knows the kind's name.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadyn.kinds import BUILT_IN, DENSE, find_kind

PACKAGE = Path(__file__).parents[1] / "megadyn"
ROOMS = (
    "__main__",
    "commands",
    "benchmark",
    "pretrain",
    "report",
    "evaluation",
    "training",
    "checkpoint",
    "engine",
    "telemetry",
    "launch",
    "hf",
    "network",
    "layers of kinds",
    "routing",
    "model",
    "parallel",
    "kernels",
    "prepare",
    "data",
    "tokenization",
    "planning",
    "config",
    "kinds",
    "costs",
    "checks",
    "arguments",
    "paths",
    "hub",
    "files",
    "progress",
    "errors",
    "log",
)
"""Highest first. The modules of `layers of kinds` are found by name, so that nothing imports them but each other."""
SIDE_BY_SIDE = (("checkpoint", "engine", "telemetry", "launch"), ("errors", "log"))
"""Rooms of which none knows another."""
SHIPPED = "exported"
"""`kinds/*/exported.py`: beside the rooms."""
SHIPPED_WITH = tuple(
    f"megadyn.hf.{name}"
    for name in ("cache_megadyn", "layers_megadyn", "packing_megadyn", "configuration_megadyn")
)
FOR_TYPES_ALONE = {("kinds/older.py", "torch.Tensor")}
"""Imports under `if TYPE_CHECKING`, which nothing runs, that a rule against torch lets pass. None may point up."""
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(source: str, package: str) -> Iterator[str]:
    """Full names of all modules and members imported anywhere in `source`, under `if TYPE_CHECKING` too.

    `torch.distributed`, which `import torch` brings along, counts where it is used.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
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


def room_of(path: Path) -> str:
    first, *inner = path.relative_to(PACKAGE).with_suffix("").parts
    if first == "kinds" and len(inner) > 1:  # inside the folder of a kind
        return {"__init__": "kinds", "exported": SHIPPED}.get(inner[-1], "layers of kinds")
    return first


def room_of_module(name: str) -> str:
    """Of an imported module or member, by its full name."""
    parts = name.split(".")[1:]
    while parts:
        path = PACKAGE.joinpath(*parts)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return room_of(file)
        parts.pop()
    raise AssertionError(f"{name} is nowhere in megadyn")


def points_down(room: str, target: str) -> bool:
    if target == room:
        return True
    if any(room in beside and target in beside for beside in SIDE_BY_SIDE):
        return False
    return ROOMS.index(target) > ROOMS.index(room)


def users(module: str) -> set[str]:
    return {where(path) for path in FILES if uses(imports_of(path), module)}


def test_the_reader_of_imports_sees_every_form_and_those_for_types_too():
    source = """
import a.b as c
from . import d
from .e import f
from ..g import h
if TYPE_CHECKING:
    import k
else:
    import l
def function():
    from i import j
    torch.distributed.barrier()
"""
    assert set(imported(source, "top.room")) == {
        "a.b",
        "top.room.d",
        "top.room.e.f",
        "top.g.h",
        "k",
        "l",
        "i.j",
        "torch.distributed",
    }


def test_every_file_stands_in_a_room():
    assert {room_of(path) for path in FILES} == {*ROOMS, SHIPPED}


def test_a_folder_of_a_kind_has_its_files_in_three_rooms():
    kind = PACKAGE / "kinds" / BUILT_IN[-1]
    assert [room_of(kind / name) for name in ("__init__.py", "layers.py", "load.py", "exported.py")] == [
        "kinds",
        "layers of kinds",
        "layers of kinds",
        SHIPPED,
    ]
    assert [room_of(PACKAGE / "kinds" / name) for name in ("__init__.py", "kind.py")] == ["kinds", "kinds"]
    assert room_of_module(f"megadyn.kinds.{BUILT_IN[-1]}.layers.AnyClass") == "layers of kinds"
    assert room_of_module("megadyn.kinds.make_kind") == "kinds"


def test_imports_point_down():
    wrong = set()
    for path in FILES:
        if room_of(path) == SHIPPED:
            continue
        for name in imports_of(path):
            if name.startswith("megadyn.") and not points_down(room_of(path), room_of_module(name)):
                wrong.add((where(path), name))
    assert not wrong


def test_one_kind_imports_nothing_of_another():
    dense = f"megadyn.kinds.{DENSE}."
    for path in (PACKAGE / "kinds").glob("*/*.py"):
        own = f"megadyn.kinds.{path.parent.name}"
        others = {
            name for name in imports_of(path) for kind in BUILT_IN if uses({name}, f"megadyn.kinds.{kind}")
        }
        assert all(uses({name}, own) or name.startswith(dense) for name in others), where(path)


def test_records_and_costs_need_no_torch():
    for path in FILES:
        if room_of(path) in ("kinds", "costs", "checks", "errors", "config", "planning"):
            needed = {name for name in imports_of(path) if (where(path), name) not in FOR_TYPES_ALONE}
            assert not uses(needed, "torch"), where(path)


def names_and_texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every name and every string in `source`, but for docstrings and comments."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text


ENGLISH = ("fixed", "nested")


def kind_in(text: str) -> str | None:
    """The name of a kind, but for `dense`, as a word of `text`: of a sentence, of snake_case, or the first of CamelCase. Of
    kinds with the name of an English word, the layer types and classes alone: a sentence may use the word."""
    names = [kind for kind in BUILT_IN if kind not in (DENSE, *ENGLISH)]
    names += [layer for kind in ENGLISH for layer in find_kind(kind).layers.values()]
    kinds = "|".join(names)
    camel = "|".join(name.title().replace("_", "") for name in names)
    found = re.search(rf"(?<![A-Za-z])({kinds})(?![A-Za-z])|(?<![A-Za-z])({camel})(?=[A-Z]|\b)", text)
    return found[0] if found else None


def test_the_reader_of_names_sees_kinds_and_spares_prose():
    source = '''"""mod in prose"""
def f(dtf_x=1):
    """dtf too"""
    a.mod, "--models mod:1", ModLayer   # dtrnet
    divmod(model, Module), "modules"
'''
    assert sorted(kind_in(text) for _, text in names_and_texts(source) if kind_in(text)) == [
        "Mod",
        "dtf",
        "mod",
        "mod",
    ]


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("kinds", "layers of kinds")])
def test_nothing_outside_its_folder_names_a_kind(room):
    found = [
        f"{where(path)}:{line}: {text!r}"
        for path in FILES
        if room_of(path) == room
        for line, text in names_and_texts(path.read_text())
        if kind_in(text)
    ]
    assert not found


def test_few_files_know_deepspeed():
    assert users("deepspeed") == {
        "engine/engine.py",
        "engine/pipeline.py",
        "launch/launch.py",
        "checkpoint/states.py",
    }


def test_few_rooms_know_torch_distributed():
    rooms = {name.split("/")[0] for name in users("torch.distributed")}
    assert rooms <= {"parallel", "engine", "launch", "checkpoint", "training", "pretrain.py"}
    assert "parallel" in rooms


def test_text_and_data_need_no_torch():
    assert not {name for name in users("torch") if name.split("/")[0] in ("prepare", "data", "tokenization")}


def test_the_exported_modelling_files_need_nothing_of_megadyn_but_each_other():
    allowed = {
        "configuration_megadyn": ("routing_of",),
        "packing_megadyn": (),
        "room_megadyn": ("packing_megadyn",),
        "cache_megadyn": ("packing_megadyn", "room_megadyn"),
        "rope_megadyn": ("configuration_megadyn",),
        "layers_megadyn": ("cache_megadyn", "configuration_megadyn", "packing_megadyn", "rope_megadyn"),
        "surprise_megadyn": ("cache_megadyn", "configuration_megadyn", "layers_megadyn", "packing_megadyn"),
        "inputs_megadyn": (
            "cache_megadyn",
            "configuration_megadyn",
            "layers_megadyn",
            "packing_megadyn",
            "rope_megadyn",
            "static_megadyn",
        ),
        "static_megadyn": ("cache_megadyn", "configuration_megadyn", "packing_megadyn"),
        "generation_megadyn": ("cache_megadyn", "static_megadyn"),
        "modeling_megadyn": (
            "cache_megadyn",
            "configuration_megadyn",
            "generation_megadyn",
            "inputs_megadyn",
            "layers_megadyn",
            "packing_megadyn",
            "routing_of",
        ),
    }
    for name, others in allowed.items():
        ours = {name for name in imports_of(PACKAGE / "hf" / f"{name}.py") if uses({name}, "megadyn")}
        assert all(any(uses({found}, f"megadyn.hf.{other}") for other in others) for found in ours), (
            name,
            ours,
        )


def test_what_a_kind_ships_needs_nothing_but_these_torch_and_transformers():
    files = [path for path in FILES if room_of(path) == SHIPPED]
    assert len(files) == len(BUILT_IN)
    standard = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}
    for path in files:
        names = imports_of(path)
        foreign = {
            name
            for name in names
            if name.split(".")[0] not in standard | {"torch", "transformers", "huggingface_hub"}
        }
        kind = find_kind(path.parent.name)
        shipped = (*SHIPPED_WITH, *(f"megadyn.hf.{name.removesuffix('.py')}" for name in kind.shared))
        assert all(any(uses({name}, module) for module in shipped) for name in foreign), (
            where(path),
            foreign,
        )
