"""Weights and optimizer states of each parameter, which DeepSpeed keeps elsewhere under each ZeRO stage."""

import math
from typing import Any

import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from megadyn.checkpoint.trained import Trained
from megadyn.parallel.params import is_matrix, part_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a parameter."""
MOMENTUM = ("momentum",)
"""Muon's."""


class OptimizerAccess:
    """Each parameter's fp32 weight and optimizer states, whole across data-parallel ranks, under any ZeRO stage."""

    def __init__(self, engine: Trained):
        self.zero_stage = engine.zero_stage
        wrapper = engine.engine.optimizer
        self.optimizer: Any = wrapper if self.zero_stage == 0 else wrapper.optimizer
        self.uses_muon = engine.config.optimizer.name == "muon"
        self.dp = engine.grid.dp
        self._allocate(wrapper)

    def _allocate(self, wrapper: Any) -> None:
        """Creates the states that the optimizer would create in its first step, so that they can be read and set before it."""
        held = next(
            (
                getattr(wrapper, name)
                for name in (
                    "single_partition_of_fp32_groups",  # ZeRO-1 and 2
                    "fp32_groups_flat_partition",  # the bf16 optimizer
                    "fp32_partitioned_groups_flat",  # ZeRO-3
                )
                if hasattr(wrapper, name)
            ),
            None,
        )
        if held is None:
            held = [param for group in self.optimizer.param_groups for param in group["params"]]
        states = [self.optimizer.state_of(tensor) for tensor in held]
        self.counts = [state["step"] for state in states if "step" in state]
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            # DeepSpeed links parameters to their moments once, after the first group's first step, when the other
            # groups have no moments yet. Now that all exist, make it link again.
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()

    @property
    def steps(self) -> float:
        """AdamW's steps so far."""
        return float(self.counts[0])

    @steps.setter
    def steps(self, value: float) -> None:
        for count in self.counts:
            count.fill_(value)

    def states(self, param: nn.Parameter) -> tuple[str, ...]:
        """Names of a parameter's optimizer states."""
        return MOMENTUM if self.uses_muon and is_matrix(param) else MOMENTS

    def get(self, param: nn.Parameter) -> dict[str, Tensor]:
        """`weight` and the optimizer states, fp32. Collective over data-parallel ranks."""
        names = self.states(param)
        if self.zero_stage == 0:
            return {"weight": param.detach()} | {key: self.optimizer.state[param][key] for key in names}
        return {"weight": safe_get_full_fp32_param(param)} | {
            key: safe_get_full_optimizer_state(param, key) for key in names
        }

    def has_states(self, param: Any) -> bool:
        """Whether this rank has any of the parameter's states. Under ZeRO 1 and 2 it has those of few parameters."""
        return self.zero_stage not in (1, 2) or param._hp_mapping is not None

    def rows(self, param: Any) -> range:
        """The rows of this tensor rank's part that `set` takes: under ZeRO-3 those of this rank's partition, else all."""
        whole = range(part_shape(param)[0])
        if self.zero_stage != 3 or param.numel() == param.ds_numel:  # small parameters stay gathered
            return whole
        width, size = param.ds_numel // len(whole), param.ds_tensor.numel()
        first = self.dp.rank * size
        return whole[first // width : -(-(first + size) // width)]

    def set(self, param: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Sets `weight` and any of the optimizer states from `rows` of this tensor rank's part."""
        values = {key: value.to(param.device) for key, value in values.items()}
        if self.zero_stage == 3:
            self._set_partition(param, values)
            return
        for key, value in values.items():
            if key == "weight":
                param.data.copy_(value)
                if self.zero_stage:
                    safe_set_full_fp32_param(param, value)
            elif self.zero_stage:
                safe_set_full_optimizer_state(param, value, key)
            else:
                self.optimizer.state[param][key].copy_(value)

    def _set_partition(self, param: Any, values: dict[str, Tensor]) -> None:
        size, rows = param.ds_tensor.numel(), self.rows(param)
        first = self.dp.rank * size - rows.start * math.prod(param.ds_shape[1:])
        for key, value in values.items():
            # The last ranks' partitions are padded, or nothing but padding.
            held = value.flatten()[first : first + size]
            mine = F.pad(held, (0, size - held.numel()))
            if key == "weight":
                param.ds_tensor.data.copy_(mine)
                if param.numel() == param.ds_numel:
                    param.data.copy_(value.view(param.ds_shape))
                safe_set_local_fp32_param(param, mine)
            else:
                safe_set_local_optimizer_state(param, mine, key)
