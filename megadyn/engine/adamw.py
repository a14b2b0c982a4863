"""torch's AdamW, as this engine uses it."""

import inspect

import torch
from torch import Tensor

adamw_step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
"""torch's step, less the wrapper that imports torch's compiler at every start and serves steps that are differentiated or
compiled themselves, and without the optimizer's hooks."""


class AdamW(torch.optim.AdamW):
    step = adamw_step  # torch adds the hooks

    def state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """The state of one of the optimizer's tensors; before the first step, the one that it would create."""
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            state |= {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
        return state
