"""The fused loss of one process, against torch's own cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from megadyn.parallel import loss
from megadyn.parallel.linear import upcast
from megadyn.parallel.loss import LogitOptions, linear_cross_entropy
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.networks import ALONE


def draw(dtype: torch.dtype = torch.float64, vocab: int = 11, rows: int = 11):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 4).to(dtype).requires_grad_()
    weight = torch.randn(rows, 4).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (3, 5))


def reference(hidden, weight, labels):
    return F.cross_entropy(upcast(hidden @ weight.T).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("block_rows", [1, 4, 11, 1000])
@pytest.mark.parametrize("rows", [11, 14], ids=["even", "padded"])
def test_loss_and_gradients_equal_torchs_for_every_block(monkeypatch, block_rows, rows):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", block_rows * 15)
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


@pytest.mark.parametrize("block_rows", [4, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_capped_logits_and_z_loss_equal_a_plain_computation(monkeypatch, block_rows, softcap, z_weight):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", block_rows * 15)
    hidden, weight, labels = draw(rows=14)
    options = LogitOptions(softcap, z_weight)
    out = linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE, options=options)
    out.backward(torch.tensor(1.7, dtype=torch.float64))
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = (hidden @ weight[:11].T).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(logits, labels.flatten())
    torch.testing.assert_close(out, want)
    ((want + z_weight * logits.logsumexp(1).square().mean()) * 1.7).backward()
    torch.testing.assert_close(got, (hidden.grad, weight.grad))


@pytest.mark.parametrize(
    ("logits", "tokens", "words"),
    [
        (2**26, 16384, 4096),
        (2**24, 12288, 1280),
        (2**24, 16384, 1024),
        (1270, 10, 127),
        (1290, 10, 128),
        (5, 10, 1),
    ],
)
def test_blocks_of_words_are_aligned(logits, tokens, words):
    assert loss._words_of_block(logits, tokens) == words


@pytest.mark.parametrize("kernel_logits", [4 * 15, 1000 * 15], ids=["in blocks", "at once"])
@pytest.mark.parametrize("options", [LogitOptions(), LogitOptions(1.5, 0.3)], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_the_same_loss_and_gradients(monkeypatch, kernel_logits, options, dtype):
    pytest.importorskip("triton", reason="triton is not installed (requirements-dev.txt)")
    monkeypatch.setattr(loss, "KERNEL_LOGITS_AT_ONCE", kernel_logits)
    found = []
    for by_kernel in (False, True):
        monkeypatch.setattr(loss, "fused", lambda x, answer=by_kernel: answer)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            hidden, weight, labels = draw(dtype, rows=14)
        out = linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE, options=options)
        out.backward(torch.tensor(1.7))
        found.append((out.detach(), hidden.grad.float(), weight.grad.float()))
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2e-3}
    torch.testing.assert_close(found[1], found[0], **close)
    labels[0, 0] = 11
    assert linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE, options=options).isnan()


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * 15)
    hidden, weight, labels = draw(rows=14)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, vocab_size=11, tp=ALONE), (hidden, weight)
    )


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, labels = draw()
    with_grad = linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE), with_grad)


@pytest.mark.parametrize("block_rows", [4, 1000])
def test_huge_logits_do_not_overflow(monkeypatch, block_rows):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", block_rows * 15)
    hidden, weight, labels = draw()
    big = (hidden * 1e4).detach().requires_grad_()
    out = linear_cross_entropy(big, weight, labels, vocab_size=11, tp=ALONE)
    torch.testing.assert_close(out, reference(big, weight, labels))
    out.backward()
    assert big.grad.isfinite().all()


@pytest.mark.parametrize("block_rows", [4, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(monkeypatch, dtype, block_rows):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", block_rows * 15)
    hidden, weight, labels = draw(dtype)
    out = linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference(hidden, weight, labels))
    out.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    exact_hidden, exact_weight = (
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
    )
    reference(exact_hidden, exact_weight, labels).backward()
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=0.03, atol=2e-3)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=0.03, atol=4e-3)


@pytest.mark.parametrize("block_rows", [4, 1000])
def test_a_loss_that_is_no_number_spoils_every_gradient(monkeypatch, block_rows):
    """`engine/loss_gate.py` counts on it."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", block_rows * 15)
    hidden, weight, labels = draw()
    linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE).backward(
        torch.tensor(torch.nan, dtype=torch.float64)
    )
    assert hidden.grad.isnan().all()
    assert weight.grad.isnan().all()


def test_the_head_needs_a_small_part_of_its_logits_memory(monkeypatch):
    """16k tokens, 152k words and hidden size 2048 in 1 GB, the gradients of weights (0.62 GB) and hidden states among it; here
    with tokens and words cut by 32 and the hidden size by 8, so all memory by 256."""
    tokens, vocab, size = 16384 // 32, 152064 // 32, 2048 // 8
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", loss.LOGITS_AT_ONCE // 256)
    hidden = torch.randn(tokens, size).bfloat16().requires_grad_()
    weight = torch.randn(vocab, size).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    with LiveBytes() as live:
        before = live.now
        linear_cross_entropy(hidden, weight, labels, vocab_size=vocab, tp=ALONE).backward()
    assert live.peak - before < 1e9 / 256
    assert tokens * vocab * 2 > 1e9 / 256, "all logits would not show"


@pytest.mark.parametrize(
    "label", [-1, 11, 13, 14, 10**6], ids=["negative", "padding", "last of padding", "behind", "far behind"]
)
@pytest.mark.parametrize("block_rows", [4, 1000])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(monkeypatch, label, block_rows):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", block_rows * 15)
    hidden, weight, labels = draw(rows=14)
    labels[1, 2] = label
    assert linear_cross_entropy(hidden, weight, labels, vocab_size=11, tp=ALONE).isnan()
