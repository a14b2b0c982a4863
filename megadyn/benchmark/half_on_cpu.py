"""Faster half-precision matrix products on a CPU without instructions for them, where torch's own take some 25 times as long
as in fp32."""

import warnings

import torch

_library: torch.library.Library | None = None


def widen_products() -> bool:
    """From now on this process multiplies bf16 and fp16 matrices on the CPU in fp32 and rounds the product, as a GPU does.

    Torch's kernels accumulate in fp32 too: results differ by the order of summation at most. Returns False, and changes
    nothing, if the CPU has bf16 instructions.
    """
    global _library
    if torch.cpu._is_avx512_bf16_supported():
        return False
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch says that a kernel is replaced, which is the point
            _library.impl("mm", _mm, "CPU")
    return True


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # The variant with `out` is another operation, which keeps torch's kernel.
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    product = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=product).to(a.dtype)
