"""Half-precision products by way of fp32 are torch's own, but for the order of summation; other types are left alone."""

import pytest
import torch

from megadyn.benchmark.half_on_cpu import _addmm, _mm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(33, 300).to(dtype), torch.randn(300, 17).to(dtype)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    bias = torch.randn(17).to(dtype)
    product, total = _mm(a, b), _addmm(bias, a, b, beta=0.5, alpha=2)
    exact = a.double() @ b.double()
    half_a_unit = torch.finfo(dtype).eps / 2
    for found, wanted in ((product, exact), (total, 0.5 * bias.double() + 2 * exact)):
        assert (found.dtype, found.shape) == (dtype, (33, 17))
        assert ((found.double() - wanted).abs() <= half_a_unit * wanted.abs() + 2e-4).all()
