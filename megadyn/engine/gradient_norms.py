"""Gradient norms per component of the model, under any layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megadyn.engine.placement import place_of
from megadyn.parallel.grid import Grid
from megadyn.parallel.params import component, counts_here, name_of

COMPONENTS = ("embedding", "attention", "mlp", "norm", "router", "prior", "head")
"""The squares of their norms add up to the square of the global norm. Norms of queries, keys and values count as
attention; an embedding that is tied to the head counts as embedding."""


def component_of(name: str) -> str:
    """The member of COMPONENTS that a parameter belongs to, by its global name."""
    if component(name) != "base":
        return component(name)
    words = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "mlp": "mlp"}
    return next((words[part] for part in name.split(".") if part in words), "norm")


class GradientNorms:
    """Measures norms just before the optimizer's step. By then gradients are in fp32, summed over micro-batches and
    ranks, unscaled and clipped. Each rank adds up the squares of what it owns. Does nothing in steps that are not measured."""

    def __init__(
        self,
        params: list[nn.Parameter],
        wrapper: Any,
        adam: torch.optim.Optimizer,
        zero_stage: int,
        grid: Grid,
    ):
        """`wrapper`: DeepSpeed's optimizer around `adam`; at ZeRO-0 both are the same object."""
        self._own = _own_fragments(params, wrapper, zero_stage, grid)
        self._squares: list[Tensor] = []
        self._adam = adam

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures the norms of the step that runs inside."""
        self._squares = []
        hook = self._adam.register_step_pre_hook(self._before_step)
        try:
            yield
        finally:
            hook.remove()  # also after a bad step, which is not reported

    def take(self, device: torch.device) -> Tensor:
        """This rank's share of the squares [COMPONENTS] of clipped gradients; NaN if the optimizer skipped the step."""
        squares, self._squares = self._squares, []
        if not squares:
            return torch.full((len(COMPONENTS),), torch.nan, dtype=torch.float64, device=device)
        return torch.stack(squares).sum(dim=0).to(device)

    def _before_step(self, adam: torch.optim.Optimizer, *_: object) -> None:
        """Called once per parameter group, because ZeRO steps one group after another."""
        for tensor in (param for group in adam.param_groups for param in group["params"]):
            total = torch.zeros(len(COMPONENTS), dtype=torch.float64, device=tensor.device)
            if tensor.grad is not None:
                for place, start, size in self._own.get(id(tensor), ()):
                    total[place] += (
                        tensor.grad.view(-1)[start : start + size].norm(dtype=torch.float32).double().square()
                    )
            self._squares.append(total)


def unclipped(squares: Tensor, grad_norm: float, max_norm: float) -> list[float]:
    """Norms [COMPONENTS] before clipping to `max_norm` (0: no clipping), from the squares after clipping, summed over ranks."""
    factor = max(1.0, (grad_norm + 1e-6) / max_norm) if max_norm > 0 else 1.0
    return [value**0.5 * factor for value in squares.tolist()]


Fragment = tuple[int, int, int]
"""(index into COMPONENTS, first element, number of elements) in a tensor that the optimizer updates."""


def _own_fragments(
    params: list[nn.Parameter], wrapper: Any, zero_stage: int, grid: Grid
) -> dict[int, list[Fragment]]:
    """The parts of each optimizer tensor that this rank alone counts, by the tensor's id."""
    found: dict[int, list[Fragment]] = {}
    for param in params:
        if not counts_here(param, grid.tp) or (zero_stage == 0 and grid.dp.rank):
            continue
        place = place_of(param, wrapper, zero_stage, grid.dp)
        if place.size:
            found.setdefault(id(place.tensor), []).append(
                (COMPONENTS.index(component_of(name_of(param))), place.start, place.size)
            )
    return found
