"""The rank grid. The tensor axis is fastest, then data, then pipeline, as in DeepSpeed's topology."""

from dataclasses import dataclass, field

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One axis of the grid, as this process sees it. With size 1 it is unused and `group` is None."""

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Grid:
    """The position of this process. `Grid()` is a single process."""

    tp: Axis = field(default_factory=lambda: Axis("tp"))
    pp: Axis = field(default_factory=lambda: Axis("pp"))
    dp: Axis = field(default_factory=lambda: Axis("dp"))

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1


def make_grid(tensor: int, pipeline: int) -> Grid:
    """Divides the world into tensor, pipeline and data groups. Collective: every process must call it. `batch_plan`
    must have checked that tensor x pipeline divides the number of processes."""
    world, me = dist.get_world_size(), dist.get_rank()
    assert world % (tensor * pipeline) == 0
    data = world // (tensor * pipeline)
    sizes = {"pp": pipeline, "dp": data, "tp": tensor}
    strides = {"pp": data * tensor, "dp": tensor, "tp": 1}
    return Grid(**{name: _make_axis(name, sizes[name], strides[name], world, me) for name in sizes})


def _make_axis(name: str, size: int, stride: int, world: int, me: int) -> Axis:
    if size == 1:
        return Axis(name)
    mine = None
    for first in range(world):
        if (first // stride) % size == 0:  # the first rank of a group along this axis
            ranks = range(first, first + size * stride, stride)
            group = dist.new_group(list(ranks))  # every process must take part in creating every group
            if me in ranks:
                mine = Axis(name, rank=list(ranks).index(me), size=size, group=group)
    assert mine is not None
    return mine
