"""Faster half-precision matrix products on CPUs that lack instructions for them. torch's own take about 25 times as
long as fp32 there."""

import warnings

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
ADDMM = torch.ops.aten.addmm.out
_library: torch.library.Library | None = None


def widen_products() -> bool:
    """Makes this process compute bf16 and fp16 matrix products on the CPU in fp32 and round the result, as a GPU does.

    torch's kernels also accumulate in fp32, so results differ only by the order of summation. Returns False, and
    changes nothing, if the CPU has bf16 instructions.
    """
    global _library
    if torch.cpu._is_avx512_bf16_supported():
        return False
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch warns that a kernel is replaced, which is intended
            _library.impl("mm", _mm, "CPU")
            _library.impl("addmm", _addmm, "CPU")
    return True


# The variants with `out` are other operations and keep torch's kernels.


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in HALF:
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    product = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=product).to(a.dtype)


def _addmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Linear layers with a bias come here."""
    shape = a.shape[0], b.shape[1]
    if a.dtype not in HALF:
        return ADDMM(x, a, b, beta=beta, alpha=alpha, out=a.new_empty(shape))
    total = torch.empty(shape, dtype=torch.float32)
    x, dtype = x.float(), a.dtype
    return ADDMM(x, a.float(), b.float(), beta=beta, alpha=alpha, out=total).to(dtype)
