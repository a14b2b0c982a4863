"""Statistics of a rank, and those of routed layers combined over all ranks that see different tokens."""

import resource
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megadyn.parallel.grid import Axis
from megadyn.routing.tracker import Statistic


def over_ranks(statistics: Sequence[Statistic], axes: Sequence[Axis]) -> list[Statistic]:
    """Combines each statistic over the ranks of all axes: one all-reduce per axis for sums, another for extremes. Collective."""
    found: dict[int, Statistic] = {}
    for is_sum in (True, False):
        mine = {at: it for at, it in enumerate(statistics) if (it.how in ("mean", "std")) == is_sum}
        if not mine:
            continue
        # A minimum is the negated maximum of negated values, so one reduction serves both.
        signs = {at: -1.0 if it.how == "min" else 1.0 for at, it in mine.items()}
        parts = torch.cat([it.parts * signs[at] for at, it in mine.items()])
        for axis in axes:
            if axis.size > 1:
                dist.all_reduce(
                    parts, op=dist.ReduceOp.SUM if is_sum else dist.ReduceOp.MAX, group=axis.group
                )
        pieces = parts.split([it.parts.numel() for it in mine.values()])
        found |= {at: Statistic(it.how, piece * signs[at]) for (at, it), piece in zip(mine.items(), pieces)}
    return [found[at] for at in range(len(statistics))]


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peaks of this process so far: memory allocated and reserved by torch on a CUDA device, otherwise the resident set size."""
    if device.type == "cuda":
        peaks = {
            "allocated_peak": torch.cuda.max_memory_allocated(device),
            "reserved_peak": torch.cuda.max_memory_reserved(device),
        }
    else:
        # Linux counts in KiB.
        peaks = {"resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return {name: size / 2**30 for name, size in peaks.items()}
