"""Parameters: drawn whole from a seed that depends on their name, then cut, so the initial values are the same under
any topology."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megadyn.parallel.grid import Axis
from megadyn.parallel.sharding import Sharding

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's dtype for each value of `precision`."""

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""(shape of a whole tensor, its generator) -> its initial values, in float32."""


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
        """This rank's part of tensor `name`, whose whole shape is `shape`. Only one whole tensor exists at a time.

        On the `meta` device nothing is drawn: the part has a shape but no values.
        """
        if torch.device(self.device).type == "meta":
            whole = torch.empty(shape, device="meta")
        else:
            whole = init(shape, torch.Generator().manual_seed(self.seed_for(name)))
        part = self.sharding.cut(name, whole, self.tp.rank)
        param = nn.Parameter(part.to(device=self.device, dtype=self.dtype, copy=True).contiguous())
        return mark(param, name, is_cut=self.sharding.dim(name) is not None)

    def seed_for(self, name: str) -> int:
        """Combines the run's seed and a name into one 32-bit seed, because torch's CPU generator uses no more bits."""
        return zlib.crc32(f"{self.seed}/{name}".encode())


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


def counts_here(param: Any, tp: Axis) -> bool:
    """True on the ranks that represent a parameter: every tensor rank if it is cut, otherwise the first. Of the two
    copies of a tied embedding only the first stage's counts (DeepSpeed marks the other)."""
    return (param.tensor_model_parallel or tp.rank == 0) and not getattr(param, "ds_pipe_replicated", False)
