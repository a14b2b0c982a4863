"""Exchange of Python objects between all ranks of a job. The model does not use it."""

from typing import Any

import torch.distributed as dist


def all_gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank, in order of rank. `group`: another group of all ranks, if the default one is in use. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered
