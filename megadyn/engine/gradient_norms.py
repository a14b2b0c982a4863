"""The gradient norm of each component of the model, under any layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megadyn.parallel.grid import Grid
from megadyn.parallel.params import component, counts_here, name_of

COMPONENTS = ("embedding", "attention", "mlp", "norm", "router", "prior", "head")
"""The squares of their norms add up to the whole norm's. Norms of queries, keys and values are attention's; an embedding that is
tied to the head counts as embedding."""


def component_of(name: str) -> str:
    """Which of COMPONENTS a parameter belongs to, by its global name."""
    if component(name) != "base":
        return component(name)
    words = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "mlp": "mlp"}
    return next((words[part] for part in name.split(".") if part in words), "norm")


class GradientNorms:
    """Runs before the optimizer's step, where the gradients stand summed over micro-batches and ranks, unscaled and clipped,
    in fp32: each rank adds up the squares of what it owns. Where no step is asked for it does nothing."""

    def __init__(
        self,
        params: list[nn.Parameter],
        wrapper: Any,
        adam: torch.optim.Optimizer,
        zero_stage: int,
        grid: Grid,
    ):
        """`wrapper` is DeepSpeed's optimizer around `adam`; at ZeRO-0 they are one."""
        self._own = _own_fragments(params, wrapper, zero_stage, grid)
        self._squares: list[Tensor] = []
        self._adam = adam

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The norms of the step inside are wanted."""
        self._squares = []
        hook = self._adam.register_step_pre_hook(self._before_step)
        try:
            yield
        finally:
            hook.remove()  # also behind a bad step, which is not reported

    def take(self, device: torch.device) -> Tensor:
        """This rank's share of the squares [COMPONENTS], of clipped gradients; NaN if the optimizer passed the step over."""
        squares, self._squares = self._squares, []
        if not squares:
            return torch.full((len(COMPONENTS),), torch.nan, dtype=torch.float64, device=device)
        return torch.stack(squares).sum(dim=0).to(device)

    def _before_step(self, adam: torch.optim.Optimizer, *_: object) -> None:
        """ZeRO steps one group of parameters after another."""
        for tensor in (param for group in adam.param_groups for param in group["params"]):
            total = torch.zeros(len(COMPONENTS), dtype=torch.float64, device=tensor.device)
            if tensor.grad is not None:
                for place, start, size in self._own.get(id(tensor), ()):
                    total[place] += (
                        tensor.grad.view(-1)[start : start + size].norm(dtype=torch.float32).double().square()
                    )
            self._squares.append(total)


def unclipped(squares: Tensor, grad_norm: float, max_norm: float) -> list[float]:
    """Norms [COMPONENTS] before clipping to `max_norm` (0: none was), from the squares behind it, summed over ranks."""
    factor = max(1.0, (grad_norm + 1e-6) / max_norm) if max_norm > 0 else 1.0
    return [value**0.5 * factor for value in squares.tolist()]


Fragment = tuple[int, int, int]
"""Index into COMPONENTS, and first element and number of elements in a tensor that the optimizer steps."""


def _own_fragments(
    params: list[nn.Parameter], wrapper: Any, zero_stage: int, grid: Grid
) -> dict[int, list[Fragment]]:
    """What this rank alone speaks for in each tensor that the optimizer steps, by the tensor's id.

    ZeRO steps flat partitions, one a group, and knows where in them each parameter lies.
    """
    found: dict[int, list[Fragment]] = {}
    for param in params:
        if not counts_here(param, grid.tp) or (zero_stage == 0 and grid.dp.rank):
            continue
        tensor, start, size = _place(param, wrapper, zero_stage)
        if size:
            found.setdefault(id(tensor), []).append(
                (COMPONENTS.index(component_of(name_of(param))), start, size)
            )
    return found


def _place(param: Any, wrapper: Any, zero_stage: int) -> tuple[Any, int, int]:
    """The tensor that the optimizer steps, and where this rank's part of `param` lies in it; of size 0 when it has none."""
    if zero_stage == 0:
        return param, 0, param.numel()
    if zero_stage == 3:
        group, start, size = wrapper.grad_position[wrapper.get_param_id(param)]
        return wrapper.fp32_partitioned_groups_flat[group], start, size
    fragment = param._hp_mapping
    if fragment is None:
        return None, 0, 0
    flat = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
    address = fragment.get_hp_fragment_address()
    return flat[fragment.param_group_index], address.start, address.numel
