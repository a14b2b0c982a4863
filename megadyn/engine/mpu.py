"""The process grid as DeepSpeed expects it."""

import torch.distributed as dist

from megadyn.parallel.grid import Grid


class Mpu:
    """DeepSpeed's interface to a model-parallel unit (its term for our tensor axis)."""

    def __init__(self, grid: Grid):
        self.tp, self.dp = grid.tp, grid.dp
        # For DeepSpeed None means the whole world, so an axis of size 1 needs a group with one rank.
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self.tp_group, self.dp_group = grid.tp.group or alone, grid.dp.group or alone

    def get_model_parallel_rank(self) -> int:
        return self.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.dp_group
