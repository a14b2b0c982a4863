"""Causal attention: segments against loops, every backend against the plain one."""

from unittest.mock import create_autospec

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from megadyn.errors import ConfigError
from megadyn.model import attention
from megadyn.model.attention import PACKAGES, attention_backend, causal_attention
from megadyn.model.documents import Segments, segments_of
from tests.helpers.tiny import tiny_config

F64 = torch.float64
LENGTHS = (3, 0, 1, 5, 0, 4, 0)
"""Of the segments, some empty; 13 tokens."""


def drawn(
    tokens: int = 13, heads: int = 4, groups: int = 2, size: int = 8, dtype: torch.dtype = F64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, tokens, n, size, generator=generator, dtype=F64).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    )


def segments(lengths: tuple[int, ...] = LENGTHS) -> Segments:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    return segments_of(ids, len(lengths), max(lengths))


def token_by_token(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    rows, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            heads = []
            for head in range(q.shape[2]):
                group = head * k.shape[2] // q.shape[2]
                score = (k[0, start : t + 1, group] @ q[0, t, head]) / q.shape[3] ** 0.5
                heads.append(score.softmax(dim=0) @ v[0, start : t + 1, group])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows).unsqueeze(0)


def gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(output)
    return torch.autograd.grad(output, inputs, weight)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_in_segments_equals_a_loop_over_tokens(groups):
    inputs = drawn(groups=groups)
    got, want = causal_attention(*inputs, "sdpa", segments()), token_by_token(*inputs, LENGTHS)
    assert_close(got, want)
    assert_close(gradients(got, inputs), gradients(want, inputs))


def test_one_segment_a_row_is_plain_attention():
    q, k, v = (x.detach().view(2, 6, *x.shape[2:]) for x in drawn(tokens=12))
    ids = torch.tensor([[0] * 6, [1] * 6])
    assert_close(causal_attention(q, k, v, "sdpa", segments_of(ids, 2, 6)), causal_attention(q, k, v, "sdpa"))


def test_no_token_attends():
    inputs = drawn(tokens=0)
    output = causal_attention(*inputs, "sdpa", segments_of(torch.zeros(1, 0, dtype=torch.int64), 3, 8))
    assert output.shape == inputs[0].shape
    assert all(grad.shape == x.shape for grad, x in zip(gradients(output, inputs), inputs, strict=True)), (
        "none is left out"
    )


def test_the_varlen_kernel_gets_what_it_asks_for(monkeypatch):
    """torch's kernel runs on CUDA alone; here a loop in its place, with the arguments that it documents."""

    def kernel(q, k, v, ends_q, ends_k, max_q, max_k, *, window_size, enable_gqa):
        assert ends_q.dtype == ends_k.dtype == torch.int32
        assert window_size == (-1, 0)  # causal
        assert enable_gqa == (q.shape[1] != k.shape[1])
        lengths = tuple(ends_q.diff().tolist())
        assert torch.equal(ends_q, ends_k)
        assert max_q == max_k >= max(lengths)
        return token_by_token(*(x.unsqueeze(0) for x in (q, k, v)), lengths).squeeze(0)

    known = create_autospec(torch.nn.attention.varlen.varlen_attn, side_effect=kernel)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", known)
    inputs = drawn()
    assert_close(
        causal_attention(*inputs, "varlen", segments()), causal_attention(*inputs, "sdpa", segments())
    )
    assert_close(causal_attention(*inputs, "varlen"), causal_attention(*inputs, "sdpa"))


def test_torch_2_11_s_varlen_kernel_gets_its_heads_repeated(monkeypatch):
    """It has no `enable_gqa`."""

    def kernel(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert window_size == (-1, 0)
        assert q.shape == k.shape == v.shape
        return token_by_token(*(x.unsqueeze(0) for x in (q, k, v)), tuple(cu_seq_q.diff().tolist())).squeeze(
            0
        )

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    inputs = drawn()
    want = causal_attention(*inputs, "sdpa", segments())
    got = causal_attention(*inputs, "varlen", segments())
    assert_close(got, want)
    for grad, wanted in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        assert_close(grad, wanted)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "backend",
    ["sdpa", *(pytest.param(name, marks=NEEDS_GPU) for name in ("varlen", "flash", "flash3", "cudnn"))],
)
@pytest.mark.parametrize("lengths", [None, (300, 0, 1, 723), (1024,), (0, 1, 0)], ids=str)
def test_backends_in_bf16_equal_float64(backend, lengths):
    """On a GPU where there is one."""
    if backend in PACKAGES:
        pytest.importorskip(PACKAGES[backend][0])
    inputs = drawn(tokens=sum(lengths or (1024,)), heads=8, groups=2, size=64, dtype=torch.bfloat16)
    parts = None if lengths is None else segments(lengths)
    want = causal_attention(*(x.double() for x in inputs), "sdpa", parts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = tuple(x.detach().to(device).requires_grad_() for x in inputs)
    where = None if parts is None else Segments(parts.ids.to(device), parts.ends.to(device), parts.longest)
    got = causal_attention(*own, backend, where)
    assert F.mse_loss(got.double().cpu(), want) / want.square().mean() < 1e-4
    grads, wanted = gradients(got, own), gradients(want, inputs)
    # Of queries and keys alone in their segment they are 0, and rounding shows: what counts is its size beside all gradients.
    least = 1e-2 * sum(w.double().square().mean() for w in wanted)
    for grad, w in zip(grads, wanted, strict=True):
        assert F.mse_loss(grad.double().cpu(), w.double()) / max(w.double().square().mean(), least) < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPU gets")
def test_backends_without_a_gpu():
    assert attention_backend(tiny_config(attention="auto").model, "bf16") == ("sdpa", "auto: no CUDA device")
    assert attention_backend(tiny_config(attention="sdpa").model, "fp32") == ("sdpa", "as configured")
    for asked in ("flash", "varlen"):
        with pytest.raises(ConfigError, match="sdpa on this machine: no CUDA device"):
            attention_backend(tiny_config(attention=asked).model, "bf16")


@pytest.mark.parametrize(
    ("installed", "precision", "generation", "head_dim", "want"),
    [
        (True, "bf16", (9, 0), 64, ("flash", "flash-attn runs")),
        (False, "bf16", (8, 0), 64, ("varlen", "flash-attn is not installed")),
        (True, "fp32", (9, 0), 64, ("sdpa", "no flash kernels for fp32")),
        (True, "fp16", (7, 0), 64, ("sdpa", "flash kernels need a GPU of compute capability 8.0")),
        (True, "bf16", (9, 0), 36, ("sdpa", "no flash kernels for model.head_dim = 36")),
    ],
)
def test_backends_with_a_gpu(monkeypatch, installed, precision, generation, head_dim, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: generation)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(attention, "problem_of", lambda trial: None)
    backend, why = attention_backend(tiny_config(head_dim=head_dim).model, precision)
    assert backend == want[0]
    assert why.startswith(f"auto: {want[1]}")


def test_a_backend_whose_first_call_fails_is_told_of_and_passed_over(monkeypatch):
    """As where flash-attn 4 alone is installed, whose package has other functions."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    failing = {"flash"}

    def call(q, k, v, backend, segments=None):
        if backend in failing:
            raise ImportError(f"cannot import a function of {backend}")
        return q + k.sum() + v.sum()

    monkeypatch.setattr(attention, "causal_attention", call)
    monkeypatch.setattr(attention, "own_device", lambda: torch.device("cpu"))
    model = tiny_config().model
    assert attention_backend(model, "bf16") == (
        "varlen",
        "auto: flash attention failed at a first call (ImportError: cannot import a function of flash)",
    )
    failing.add("varlen")
    assert attention_backend(model, "bf16")[0] == "sdpa"
    asked = tiny_config(attention="flash").model
    with pytest.raises(ConfigError, match="sdpa on this machine: flash attention failed at a first call"):
        attention_backend(asked, "bf16")
