"""Counts kernels instead of running them, on tensors without values."""

from collections.abc import Callable

from torch import Tensor

counters: list[Callable[[int], None]] = []
"""Functions that are told how many bytes each launch would move."""


def has_values(x: Tensor, *, moved: int) -> bool:
    """Whether a kernel can be launched on x. If not (`meta` device), tells `counters` the bytes that the launch would move.

    Args:
        moved: bytes that the kernel must read and write, each once.
    """
    if not x.is_meta:
        return True
    for counter in counters:
        counter(moved)
    return False
