"""The fused loss of one process, against torch's own cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from megadyn.parallel import loss
from megadyn.parallel.loss import linear_cross_entropy, upcast
from tests.networks import ALONE


def draw(dtype: torch.dtype = torch.float64, vocab: int = 11, rows: int = 11):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 4).to(dtype).requires_grad_()
    weight = torch.randn(rows, 4).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (3, 5))


def reference(hidden, weight, labels):
    return F.cross_entropy(upcast(hidden @ weight.T).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("chunk_tokens", [1, 4, 15, 1000])
@pytest.mark.parametrize("rows", [11, 14], ids=["even", "padded"])
def test_loss_and_gradients_equal_torchs_for_every_chunk(monkeypatch, chunk_tokens, rows):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_tokens * rows)
    hidden, weight, labels = draw(rows=rows)
    out = linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE)
    out.backward(torch.tensor(1.7, dtype=torch.float64))
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    want = reference(hidden, weight[:11], labels)
    want.backward(torch.tensor(1.7, dtype=torch.float64))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(got, (hidden.grad, weight.grad))
    assert not got[1][11:].any()


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * 14)
    hidden, weight, labels = draw(rows=14)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, vocab_size=11, tp=ALONE), (hidden, weight))


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, labels = draw()
    with_grad = linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE), with_grad)


def test_huge_logits_do_not_overflow():
    hidden, weight, labels = draw()
    big = (hidden * 1e4).detach().requires_grad_()
    out = linear_cross_entropy(big, weight, labels, vocab_size=11, tp=ALONE)
    torch.testing.assert_close(out, reference(big, weight, labels))
    out.backward()
    assert big.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    hidden, weight, labels = draw(dtype)
    out = linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference(hidden, weight, labels))
    out.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    reference(exact_hidden, exact_weight, labels).backward()
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=0.03, atol=2e-3)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=0.03, atol=4e-3)
