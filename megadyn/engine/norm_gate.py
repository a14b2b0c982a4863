"""Keeps a step whose gradient norm is a spike out of the weights (`training.norm_spike_factor`)."""

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.config import Config
from megadyn.engine.replaced import replaced

FUNCTION = "get_global_norm_of_tensors"
"""That DeepSpeed's bf16 optimizer calls in its module."""


class NormGate:
    """Makes the norm of a step infinite between the reduction of gradients and the update, if it is above `limit`. Then each of
    DeepSpeed's optimizers, and ours for ZeRO-0, skips the step, as after a gradient overflow."""

    def __init__(self, device: torch.device):
        self.limit = math.inf
        self.norm = 0.0
        """Of the last step that came here; the largest of all ranks, between which it differs by rounding."""
        self._spiked = False
        self._device = device

    def __call__(self, norm: Tensor | float) -> Tensor:
        """The norm, or infinity. Collective over all ranks of the job, so that none updates alone."""
        here = torch.as_tensor(norm, dtype=torch.float32, device=self._device).reshape(())
        here = torch.where(
            torch.isfinite(here) & (here >= 0), here, math.inf
        )  # DeepSpeed may call an infinite one -1
        found = torch.stack([here, (here > self.limit).float()])
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        self.norm, above = found.tolist()
        self._spiked = bool(above) and math.isfinite(self.norm)
        return torch.full_like(here, math.inf) if above else here

    def take(self, norm: Tensor) -> tuple[Tensor, str | None]:
        """The step's norm, where DeepSpeed says `norm`, and what was wrong with it if it was finite and above the limit."""
        spiked, self._spiked = self._spiked, False
        if not spiked:
            return norm, None
        return torch.tensor(self.norm), f"a gradient norm of {self.norm:.4f}, above {self.limit:.4f}"

    def attach(self, wrapper: Any) -> None:
        """Puts the gate into DeepSpeed's optimizer, or at ZeRO-0 our clipper, where it has reduced gradients and not yet used
        them."""
        if hasattr(wrapper, "gate"):
            wrapper.gate = self
            return
        module = sys.modules[type(wrapper).__module__]
        if hasattr(wrapper, "_get_norm_groups"):  # ZeRO-3
            groups, combine = wrapper._get_norm_groups, module.combine_grad_norm_groups
            wrapper._get_norm_groups = lambda: [self(combine(groups()))]
        elif hasattr(module, FUNCTION):
            wrapper.step = self._with_module_norm(wrapper.step, module)
        else:
            norm = wrapper.scaled_global_norm
            wrapper.scaled_global_norm = lambda *args, **named: self(norm(*args, **named))

    def _with_module_norm(self, step: Any, module: Any) -> Any:
        """`step` of DeepSpeed's bf16 optimizer, which calls a function of its module for the norm."""
        whole = getattr(module, FUNCTION)

        def gated_step(*args: Any, **named: Any) -> Any:
            with replaced(module, FUNCTION, lambda *a, **k: self(whole(*a, **k))):
                return step(*args, **named)

        return gated_step


def norm_gate(config: Config, wrapper: Any, device: torch.device) -> NormGate | None:
    """A gate attached to `wrapper`, as `NormGate.attach` has it; None if no norm is a spike."""
    if not config.training.norm_spike_factor:
        return None
    gate = NormGate(device)
    gate.attach(wrapper)
    return gate
