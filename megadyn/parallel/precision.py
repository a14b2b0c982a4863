"""The precisions of a run, and the one that sums are made in."""

import torch
from torch import Tensor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the configuration's `precision`."""


def upcast(x: Tensor) -> Tensor:
    """At least float32: half precisions are widened, float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
