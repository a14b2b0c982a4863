"""Which kernels run: Triton's on CUDA tensors where `training.kernels` allows it, else torch's own operations."""

import importlib.util

import torch
from torch import Tensor

from megadyn.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
"""Compute capability that flash attention and our own kernels need: bf16 arithmetic."""
LARGEST_WIDTH = 16384
"""Columns of a row that one program holds whole, for a norm; wider ones are torch's."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The kernels add up in float32, so float64 is torch's."""


class _Process:
    """What holds for this whole process, as torch's own `torch.backends` does: a device has its kernels or has not."""

    uses_triton = False


def gpu_lacks(kernels: str) -> str | None:
    """Why these kernels run on no device of this machine, None if they do."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = LEAST_CAPABILITY
    return (f"{kernels} need a GPU of compute capability {major}.{minor}"
            if torch.cuda.get_device_capability() < LEAST_CAPABILITY else None)


def kernel_choice(asked: str) -> tuple[str, str]:
    """`triton` or `torch`, and why. Raises ConfigError when Triton is asked for and cannot run here."""
    why_not = gpu_lacks("Triton kernels") or (
        "Triton is not installed (pip install megadyn[kernels])" if importlib.util.find_spec("triton") is None else None)
    if asked == "triton" and why_not:
        raise ConfigError("training.kernels", asked, f"torch on this machine: {why_not}")
    if asked != "auto":
        return asked, "as configured"
    return ("torch", f"auto: {why_not}") if why_not else ("triton", "auto: a CUDA device and Triton are there")


def use_kernels(asked: str) -> tuple[str, str]:
    """Takes the choice for this process; returns it and why."""
    chosen, why = kernel_choice(asked)
    _Process.uses_triton = chosen == "triton"
    return chosen, why


def fused(x: Tensor) -> bool:
    """Operations on x go to our kernels."""
    return _Process.uses_triton and x.is_cuda and x.dtype in KERNEL_DTYPES
