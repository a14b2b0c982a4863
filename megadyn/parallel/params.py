"""Parameters: drawn in strips from seeds that depend on their name, so the initial values are the same under any topology."""

import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megadyn.parallel.grid import Axis
from megadyn.parallel.sharding import Sharding, kind_of

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's dtype for each value of `precision`."""

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""(shape of a strip of a tensor, its generator) -> its initial values, in float32. Up to `STRIP` elements are one strip."""

STRIP = 1 << 20
"""Most elements of a strip, unless one slice has more. Each strip has its own generator: a rank draws only the strips that it
holds, in parallel, and all ranks draw the same numbers."""


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return lambda shape, generator: torch.randn(shape, generator=generator).mul_(std)


def constant(value: float) -> Init:
    """The same value everywhere; draws no random numbers."""
    return lambda shape, generator: torch.full(shape, value)


@dataclass(frozen=True)
class ParamMaker:
    """Creates this rank's part of any parameter of the model."""

    sharding: Sharding
    seed: int = 0
    tp: Axis = field(default_factory=lambda: Axis("tp"))
    seq: Axis = field(default_factory=lambda: Axis("seq"))
    """The `tp` axis under sequence parallelism: modules created with this work on a part of the sequence."""
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __call__(self, name: str, shape: tuple[int, ...], init: Init) -> nn.Parameter:
        """This rank's part of tensor `name`, whose whole shape is `shape`.

        On the `meta` device nothing is drawn: the part has a shape but no values.
        """
        dim, first, stop = self.sharding.bounds(name, shape, self.tp.rank)
        part_shape = (*shape[:dim], stop - first, *shape[dim + 1 :])
        if torch.device(self.device).type == "meta":
            part = torch.empty(part_shape, device="meta")
        else:
            part = torch.zeros(part_shape)  # vocabulary rows beyond the last stay zero
            self._draw(part, name, shape, init, dim, first)
        param = nn.Parameter(part.to(device=self.device, dtype=self.dtype))
        return mark(param, name, is_cut=self.sharding.dim(name) is not None)

    def _draw(
        self, part: Tensor, name: str, shape: tuple[int, ...], init: Init, dim: int, first: int
    ) -> None:
        """Fills `part`, which begins at `first` along `dim`, from the strips that it overlaps."""
        stop = min(first + part.shape[dim], shape[dim])
        slices = max(1, STRIP * shape[dim] // max(1, math.prod(shape)))  # of a strip

        def fill(strip: int) -> None:
            begin, end = strip * slices, min((strip + 1) * slices, shape[dim])
            seed = self.seed_for(f"{name}/{strip}" if strip else name)
            values = init((*shape[:dim], end - begin, *shape[dim + 1 :]), torch.Generator().manual_seed(seed))
            low, high = max(begin, first), min(end, stop)
            part.narrow(dim, low - first, high - low).copy_(values.narrow(dim, low - begin, high - low))

        strips = range(first // slices, -(-stop // slices)) if first < stop else range(0)
        if len(strips) <= 1:
            for strip in strips:
                fill(strip)
        else:
            with ThreadPoolExecutor(own_cores()) as pool:  # torch draws without Python's lock
                list(pool.map(fill, strips))

    def seed_for(self, name: str) -> int:
        """Combines the run's seed and a name into one 32-bit seed, because torch's CPU generator uses no more bits."""
        return zlib.crc32(f"{self.seed}/{name}".encode())


def own_cores() -> int:
    """Cores of this machine for each of its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def mark(param: Any, name: str, *, is_cut: bool) -> nn.Parameter:
    """Stores a parameter's name and whether it is cut, for `name_of` and `is_cut`."""
    param.global_name = name
    param.tensor_model_parallel = is_cut  # DeepSpeed's gradient norm reads this name
    return param


def name_of(param: Any) -> str:
    """The parameter's Hugging Face name, the same under every cut."""
    return param.global_name


def component(name: str) -> str:
    """The learning-rate multiplier of a parameter: `router`, `prior` or `base`."""
    parts = name.split(".")
    if "router" in parts or "causal_router" in parts:
        return "router"
    return "prior" if "prior" in parts else "base"


def part_shape(param: Any) -> torch.Size:
    """Shape of this tensor rank's part, also while ZeRO-3 has it cut over data-parallel ranks."""
    return getattr(param, "ds_shape", param.shape)


def is_matrix(param: Any) -> bool:
    """Whether this is a matrix of a block: of attention or a feed-forward, not of embedding, head, a router or a prior."""
    name = name_of(param)
    return len(part_shape(param)) == 2 and component(name) == "base" and kind_of(name) != "vocab"


def counts_here(param: Any, tp: Axis) -> bool:
    """True on the ranks that represent a parameter: every tensor rank if it is cut, otherwise the first. Of the two
    copies of a tied embedding only the first stage's counts (DeepSpeed marks the other)."""
    return (param.tensor_model_parallel or tp.rank == 0) and not getattr(param, "ds_pipe_replicated", False)
