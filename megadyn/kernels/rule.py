"""Decides which kernels run: Triton's on CUDA tensors if `training.kernels` allows it, otherwise torch's own operations."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megadyn.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
"""Compute capability needed by flash attention and by our kernels, for bf16 arithmetic."""
LARGEST_WIDTH = 8192
"""Widest row that one program holds completely, for a norm; torch handles wider ones. Of a row twice as wide, backward would
spill 200 bytes per thread or more (compiled for sm_90)."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Our kernels accumulate in float32, so torch handles float64."""


class _Process:
    """State of the whole process, like torch's own `torch.backends`, because a device either supports the kernels or not."""

    uses_triton = False


def gpu_lacks(kernels: str) -> str | None:
    """Why these kernels cannot run on this machine's GPU; None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = LEAST_CAPABILITY
    return (
        f"{kernels} need a GPU of compute capability {major}.{minor}"
        if torch.cuda.get_device_capability() < LEAST_CAPABILITY
        else None
    )


def own_device() -> torch.device:
    """The GPU that this process will use. Works before the ranks meet, when no device is set yet."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def problem_of(trial: Callable[[], object]) -> str | None:
    """Calls `trial` and returns its error in one line, or None. Only a call can show that a package lacks a function, a
    compiler or a header."""
    try:
        trial()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def _launch_triton() -> None:
    """Launches a first kernel, for which Triton compiles its driver."""
    from megadyn.kernels.rows import take_rows

    device = own_device()
    x = torch.zeros(2, 8, device=device)
    take_rows(x, torch.tensor([1], device=device))
    torch.cuda.synchronize(device)


def _triton_lacks() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    problem = problem_of(_launch_triton)
    return problem and f"a first Triton kernel failed ({problem}); it needs a C compiler and Python's headers"


def kernel_choice(asked: str) -> tuple[str, str]:
    """(`triton` or `torch`, reason). Raises ConfigError if Triton is required but cannot run here."""
    why_not = gpu_lacks("Triton kernels") or (None if asked == "torch" else _triton_lacks())
    if asked == "triton" and why_not:
        raise ConfigError("training.kernels", asked, f"torch on this machine: {why_not}")
    if asked != "auto":
        return asked, "as configured"
    return ("torch", f"auto: {why_not}") if why_not else ("triton", "auto: a first kernel ran")


def use_kernels(asked: str, hidden_size: int) -> tuple[str, str]:
    """Applies the choice to this process; returns it and the reason, with what a model of this width leaves to torch."""
    chosen, why = kernel_choice(asked)
    if chosen == "triton" and hidden_size > LARGEST_WIDTH:
        why += (
            f"; norms by torch, because {hidden_size} columns are more than the {LARGEST_WIDTH} of a kernel"
        )
    _Process.uses_triton = chosen == "triton"
    return chosen, why


@contextmanager
def counting(kernels: str) -> Iterator[None]:
    """Inside, tensors without values (`meta` device) take the way of `kernels`, `triton` or `torch`, whatever the machine.

    Raises ConfigError if Triton is required but not installed.
    """
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError("training.kernels", kernels, "torch on this machine: Triton is not installed")
    before, _Process.uses_triton = _Process.uses_triton, kernels == "triton"
    try:
        yield
    finally:
        _Process.uses_triton = before


def fused(x: Tensor) -> bool:
    """Whether operations on x use our kernels. A tensor without values stands for one on a GPU. In a compiled graph the
    compiler fuses torch's own operations, also with what stands beside them."""
    if torch.compiler.is_compiling():
        return False
    return _Process.uses_triton and (x.is_cuda or x.is_meta) and x.dtype in KERNEL_DTYPES
