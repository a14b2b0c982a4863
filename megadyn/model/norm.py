"""RMSNorm (arXiv 1910.07467)."""

import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.kernels.rule import LARGEST_WIDTH, fused
from megadyn.parallel.mappings import copy_to_tp
from megadyn.parallel.params import ParamMaker, constant


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight * scale over the last dimension; computed in float32 or wider."""

    def __init__(self, name: str, size: int, eps: float, *, make: ParamMaker, scale: float = 1.0):
        super().__init__()
        self.eps, self.scale, self.seq = eps, scale, make.seq
        self.weight = make(f"{name}.weight", (size,), constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scaled_weight()
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def of_sum(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """x + update and its norm, both with x's shape [..., size]; one kernel if `training.kernels` selects Triton."""
        if fused(x) and x.shape[-1] <= LARGEST_WIDTH:
            from megadyn.kernels.norm import add_norm

            return add_norm(x, update, self.scaled_weight(), self.eps)
        total = x + update
        return total, self(total)

    def scaled_weight(self) -> Tensor:
        """[size]; under sequence parallelism its gradient is summed over the parts of the sequence."""
        weight = copy_to_tp(self.weight, self.seq)
        return weight if self.scale == 1 else weight * self.scale


class HeadNorm(RMSNorm):
    """RMSNorm over each head's own dimension, x [..., heads/tp, head_dim]; all heads share one weight.

    Each tensor rank normalizes its own heads, so the weight's gradient is summed over the ranks.
    """

    def __init__(self, name: str, size: int, eps: float, *, make: ParamMaker):
        super().__init__(name, size, eps, make=make)
        self.tp = make.tp

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, copy_to_tp(self.weight, self.tp), self.eps)
