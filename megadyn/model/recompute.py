"""Activations that are computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *inputs: Any, when: bool) -> Any:
    """function(*inputs); `when` it is true, of all that lies between only the inputs are kept for the backward pass."""
    if not (when and torch.is_grad_enabled()):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
