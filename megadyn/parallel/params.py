"""Parameters: drawn whole from a seed tied to their name, then cut, so that no topology changes the start."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megadyn.parallel.grid import Axis
from megadyn.parallel.sharding import Sharding

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the configuration's `precision`."""

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""A whole tensor's shape and its generator -> its initial values, in float32."""


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return lambda shape, generator: torch.randn(shape, generator=generator).mul_(std)


def constant(value: float) -> Init:
    """One value everywhere; draws nothing."""
    return lambda shape, generator: torch.full(shape, value)


@dataclass(frozen=True)
class ParamMaker:
    """Makes this rank's part of any parameter of the model."""

    sharding: Sharding
    seed: int = 0
    tp: Axis = field(default_factory=lambda: Axis("tp"))
    seq: Axis = field(default_factory=lambda: Axis("seq"))
    """`tp` again under sequence parallelism: whoever is made with this computes on a part of the sequence."""
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __call__(self, name: str, shape: tuple[int, ...], init: Init) -> nn.Parameter:
        """The part of tensor `name` (whole: `shape`) that this rank holds. One whole tensor exists at a time.

        On the `meta` device nothing is drawn: the part has its shape and no values.
        """
        if torch.device(self.device).type == "meta":
            whole = torch.empty(shape, device="meta")
        else:
            whole = init(shape, torch.Generator().manual_seed(self.seed_for(name)))
        part = self.sharding.cut(name, whole, self.tp.rank)
        param = nn.Parameter(part.to(device=self.device, dtype=self.dtype, copy=True).contiguous())
        return mark(param, name, is_cut=self.sharding.dim(name) is not None)

    def seed_for(self, name: str) -> int:
        """The run's seed and a name as one 32-bit seed: all that torch's CPU generator takes."""
        return zlib.crc32(f"{self.seed}/{name}".encode())


def mark(param: Any, name: str, *, is_cut: bool) -> nn.Parameter:
    """Writes on a parameter what others read there; see `name_of` and `is_cut`."""
    param.global_name = name
    param.tensor_model_parallel = is_cut  # DeepSpeed's gradient norm reads this name
    return param


def name_of(param: Any) -> str:
    """The parameter's Hugging Face name, the same under every cut."""
    return param.global_name


def component(name: str) -> str:
    """Which learning-rate multiplier a parameter takes: `router`, `prior` or `base`."""
    parts = name.split(".")
    if "router" in parts or "causal_router" in parts:
        return "router"
    return "prior" if "prior" in parts else "base"


def counts_here(param: Any, tp: Axis) -> bool:
    """True on the ranks that speak for a parameter: every tensor rank if it is cut, else the first; of the two ends
    of a tied embedding the first stage's (DeepSpeed marks the other)."""
    return (param.tensor_model_parallel or tp.rank == 0) and not getattr(param, "ds_pipe_replicated", False)
