"""Half-precision products by way of fp32 are torch's own, but for the order of summation; other types are left alone."""

import pytest
import torch

from megadyn.benchmark.half_on_cpu import _mm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(33, 300).to(dtype), torch.randn(300, 17).to(dtype)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    product = _mm(a, b)
    assert (product.dtype, product.shape) == (dtype, (33, 17))
    exact = a.double() @ b.double()
    half_a_unit = torch.finfo(dtype).eps / 2
    assert ((product.double() - exact).abs() <= half_a_unit * exact.abs() + 1e-4).all()
