"""Noise that is the same under every layout: a sample's noise depends on its position in the step's global batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import own_part


def uniform_by_sample(
    like: Tensor, seq: Axis, seed_for: Callable[[str], int], name: str, first: int
) -> Tensor:
    """Uniform in [0, 1), shaped as `like` [B, T/seq, n], equal on all tensor ranks; drawn in float32 for every precision.

    Args:
        seed_for: from `ParamMaker`. name: of the noise and the step. first: position of the first sample in the global batch.
    """
    noise = like.new_empty(like.shape[0], like.shape[1] * seq.size, *like.shape[2:], dtype=torch.float32)
    if noise.is_meta:  # no values, and torch has no generator for them
        return own_part(noise.uniform_(), seq).to(like.dtype)
    generator = torch.Generator(like.device)
    for sample, row in enumerate(noise, start=first):
        generator.manual_seed(seed_for(f"{name}/{sample}"))
        row.uniform_(generator=generator)
    return own_part(noise, seq).to(like.dtype)
