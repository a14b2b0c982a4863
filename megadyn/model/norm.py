"""RMSNorm (arXiv 1910.07467)."""

import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.parallel.params import ParamMaker, constant


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in at least float32."""

    def __init__(self, name: str, size: int, eps: float, *, make: ParamMaker):
        super().__init__()
        self.eps = eps
        self.weight = make(f"{name}.weight", (size,), constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
