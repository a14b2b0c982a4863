"""What a snapshot asks of the device: whether numbers are finite is found out there, not on one core of the host, and the
copies go to page-locked memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megadyn.checkpoint import host_copies, layout, save_load
from megadyn.checkpoint.host_copies import CHUNK, HostCopies
from megadyn.parallel.grid import Grid
from megadyn.parallel.params import mark
from tests.helpers.crew import Crew

NAMES = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight")


class Access:
    """In the place of an optimizer's states."""

    def __init__(self, engine):
        self.known = engine.known

    def states(self, param):
        return ("exp_avg",)

    def get(self, param):
        return {"weight": param.detach(), "exp_avg": self.known[param.global_name]}


def engine_with(moments: dict[str, torch.Tensor]) -> SimpleNamespace:
    params = [mark(nn.Parameter(torch.ones(3)), name, is_cut=False) for name in NAMES]
    return SimpleNamespace(
        grid=Grid(), device=torch.device("cpu"), known=moments, parameters=lambda: params, params=params
    )


@pytest.fixture
def checked(monkeypatch) -> list[int]:
    """Where the tensors lie that were looked through."""
    monkeypatch.setattr(save_load, "OptimizerAccess", Access)
    known, found = torch.Tensor.isfinite, []
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: (found.append(x.data_ptr()), known(x))[1])
    return found


def test_the_engines_own_tensors_are_looked_through_not_their_copies(checked):
    engine = engine_with({name: torch.zeros(3) for name in NAMES})
    shards, bad = save_load._shards(engine, HostCopies())
    own = [x.data_ptr() for param in engine.params for x in (param, engine.known[param.global_name])]
    copies = {x.data_ptr() for tensors in shards.values() for x in tensors.values()}
    assert (checked, bad) == (own, None)
    assert len(copies) == 4 and not copies & set(own)


@pytest.mark.parametrize(
    ("number", "where"), [(torch.nan, NAMES[0]), (torch.inf, NAMES[1]), (-torch.inf, NAMES[1])]
)
def test_the_first_tensor_that_is_not_finite_is_named(checked, number, where):
    moments = {name: torch.zeros(3) for name in NAMES}
    moments[where][1] = number
    assert save_load._shards(engine_with(moments), HostCopies())[1] == f"{where}/exp_avg"


class Gpu:
    """In the place of a GPU, tensors on the CPU: copies to page-locked memory are made when they are waited for."""

    def __init__(self, monkeypatch, room: int = 2**40):
        self.room, self.asked, self.waits, self.late = room, [], 0, []
        known = torch.Tensor.copy_

        def copy(to, value, non_blocking=False):
            if non_blocking:
                self.late.append((to, value))
                return to
            return known(to, value)

        def finish():
            self.waits += 1
            while self.late:
                known(*self.late.pop())

        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        self.copies = HostCopies("cpu", self.allocate, finish)

    def allocate(self, size: int) -> torch.Tensor:
        self.asked.append(size)
        if sum(self.asked) > self.room:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return torch.full((size,), 255, dtype=torch.uint8)


def numbers(engine) -> dict[str, torch.Tensor]:
    moments = {f"{name}/exp_avg": value for name, value in engine.known.items()}
    return {param.global_name: param.detach() for param in engine.params} | moments


def joined(shards) -> dict[str, torch.Tensor]:
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def test_copies_from_a_gpu_share_page_locked_memory_and_one_wait(checked, monkeypatch, tmp_path):
    gpu = Gpu(monkeypatch)
    engine = engine_with({name: torch.randn(5, 3).t() for name in NAMES})
    shards, _ = save_load._shards(engine, gpu.copies)
    assert (gpu.asked, gpu.waits) == ([CHUNK], 1)
    found, wanted = joined(shards), numbers(engine)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].is_contiguous() for name in wanted)
    for index, tensors in enumerate(shards.values()):
        save_file(tensors, tmp_path / f"{index}")
        assert (tmp_path / f"{index}").stat().st_size < 1000  # its own bytes, not all that was asked for
        assert all(
            torch.equal(value, wanted[name]) for name, value in load_file(tmp_path / f"{index}").items()
        )
    later = joined(save_load._shards(engine_with({name: torch.ones(5, 3) for name in NAMES}), gpu.copies)[0])
    assert {name: value.data_ptr() for name, value in later.items()} == {
        name: value.data_ptr() for name, value in found.items()
    }
    assert (gpu.asked, gpu.waits) == ([CHUNK], 2)


def test_large_tensors_ask_for_powers_of_two_and_small_ones_use_what_is_left(monkeypatch):
    monkeypatch.setattr(host_copies, "CHUNK", 2048)
    gpu = Gpu(monkeypatch)
    values = [torch.randn(size) for size in (700, 200, 300, 5, 0)]
    found = [gpu.copies.copy(value) for value in values]
    gpu.copies.finish()
    assert all(torch.equal(*pair) for pair in zip(found, values, strict=True))
    assert gpu.asked == [4096, 2048]  # 2800 and 800 bytes; 1200 and 20


def test_a_host_without_page_locked_memory_is_told_once(checked, monkeypatch, caplog):
    monkeypatch.setattr(host_copies, "CHUNK", 512)
    gpu = Gpu(monkeypatch, room=512)
    engine = engine_with({name: torch.randn(3) for name in NAMES})
    for _ in range(2):
        found, wanted = joined(save_load._shards(engine, gpu.copies)[0]), numbers(engine)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert gpu.asked == [512, 512]
    assert [record.getMessage() for record in caplog.records] == [
        "copies for checkpoints go through ordinary host memory, which is slower: no page-locked memory "
        "(CUDA error: out of memory)"
    ]


def test_page_locked_memory_is_torchs_and_not_asked_for_on_a_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", lambda size, **options: asked.append((size, options)))
    assert torch.equal(HostCopies().copy(torch.ones(3)), torch.ones(3)) and not asked
    host_copies.page_locked(7)
    assert asked == [(7, {"dtype": torch.uint8, "pin_memory": True})]


def _as_on_a_gpu(rank: int) -> None:
    def allocate(size: int) -> torch.Tensor:
        print(f"asked for {size} bytes")
        return torch.zeros(size, dtype=torch.uint8)

    HostCopies.__init__.__defaults__ = ("cpu", allocate, lambda: print("waited"))


def test_the_checkpoints_of_a_run_share_their_memory(saved: Path, tmp_path: Path):
    """Two, written in the background; the second holds what a run on a CPU saves."""
    overrides = (f"output_dir={tmp_path}", "checkpoint.interval=1", "checkpoint.background=true")
    crew = Crew(saved.parent / "config.yaml", *overrides, world=2, sabotage=_as_on_a_gpu)
    assert crew.wait() == [0, 0], crew.output()
    for rank in range(2):
        told = [line for line in crew.output(rank).splitlines() if line.startswith(("asked", "waited"))]
        assert told == [f"asked for {CHUNK} bytes", "waited", "waited"]
    wanted, found = (layout.complete_checkpoints(folder / "checkpoints") for folder in (saved, tmp_path))
    assert len(found) == 2
    for path in wanted[0].glob("*.safetensors"):
        assert path.read_bytes() == (found[0] / path.name).read_bytes()
