"""Attention in a sliding window: every backend against a loop over tokens in float64, also where tokens were left out."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.testing import assert_close

from megadyn.errors import ConfigError
from megadyn.model import attention, window
from megadyn.model.attention import attention_backend, causal_attention
from megadyn.model.documents import segments_of
from tests.helpers.tiny import tiny_config
from tests.model.test_attention import LENGTHS, drawn, gradients, segments

POSITIONS = torch.tensor([[0, 4, 5, 0, 2, 3, 9, 10, 14, 1, 2, 3, 11]])
"""Rising within the segments of LENGTHS."""


def one_by_one(inputs: tuple[Tensor, ...], size: int, ids: Tensor, positions: Tensor) -> Tensor:
    q, k, v = inputs
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [
                s for s in range(t + 1) if ids[b, s] == ids[b, t] and positions[b, t] - positions[b, s] < size
            ]
            for head in range(q.shape[2]):
                group = head * k.shape[2] // q.shape[2]
                score = k[b, seen, group] @ q[b, t, head] / q.shape[3] ** 0.5
                out[b, t, head] = score.softmax(dim=0) @ v[b, seen, group]
    return out


def as_kernel(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, before: int) -> Tensor:
    """What a kernel for segments documents: [N, H, K], a token sees `before` tokens before its own."""
    total = q.shape[0]
    ids = torch.searchsorted(ends, torch.arange(total), right=True).unsqueeze(0)
    size = total if before == -1 else before + 1
    return one_by_one(
        tuple(x.unsqueeze(0) for x in (q, k, v)), size, ids, torch.arange(total).unsqueeze(0)
    ).squeeze(0)


def varlen(q, k, v, ends_q, ends_k, max_q, max_k, *, window_size, enable_gqa):
    assert window_size[1] == 0
    return as_kernel(q, k, v, ends_q, window_size[0])


def flash_attn_varlen_func(q, k, v, ends_q, ends_k, max_q, max_k, causal, window_size):
    assert causal and window_size[1] == 0
    return as_kernel(q, k, v, ends_q, window_size[0])


def flash_attn_func(q, k, v, causal, window_size):
    ends = torch.arange(q.shape[0] + 1) * q.shape[1]
    flat = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, 0, 0, causal, window_size
    )
    return flat.view_as(q)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops in place of those that run on CUDA alone, with the arguments that they document."""
    package = ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", package)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)


@pytest.mark.parametrize("least", [1, 4, 256])
@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("is_split", [True, False])
def test_tokens_that_were_left_out_count(
    monkeypatch: pytest.MonkeyPatch, least: int, size: int, is_split: bool
) -> None:
    """In blocks of queries of different sizes, and with groups of heads."""
    monkeypatch.setattr(window, "LEAST", least)
    inputs = drawn()
    parts = segments() if is_split else None
    positions = POSITIONS if is_split else 2 * torch.arange(13).unsqueeze(0)
    got = causal_attention(*inputs, "varlen", parts, size, positions)
    ids = parts.ids if parts else torch.zeros_like(positions)
    want = one_by_one(inputs, size, ids, positions)
    assert_close(got, want)
    assert_close(gradients(got, inputs), gradients(want, inputs))


@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_backend_has_the_window(kernels: None, backend: str, size: int) -> None:
    inputs, places = drawn(), torch.arange(13).unsqueeze(0)
    parts = segments()
    got = causal_attention(*inputs, backend, parts, size)
    assert_close(got, one_by_one(inputs, size, parts.ids, places))
    rows = tuple(x.detach().view(2, 6, *x.shape[2:]) for x in drawn(tokens=12))
    ids, places = torch.zeros(2, 6), torch.arange(6).expand(2, 6)
    assert_close(causal_attention(*rows, backend, None, size), one_by_one(rows, size, ids, places))


def test_a_token_that_repeats_the_last_one_is_not_seen_by_it() -> None:
    """Padding of chosen tokens under sequence parallelism."""
    inputs, positions = drawn(tokens=6), torch.tensor([[0, 2, 5, 7, 7, 7]])
    got = causal_attention(*inputs, "sdpa", None, 4, positions)
    short = tuple(x[:, :4] for x in inputs)
    assert_close(got[:, :4], causal_attention(*short, "sdpa", None, 4, positions[:, :4]))


def test_no_token_attends() -> None:
    inputs = drawn(tokens=0)
    empty = torch.zeros(1, 0, dtype=torch.int64)
    output = causal_attention(*inputs, "sdpa", segments_of(empty, 3, 8), 4, empty)
    assert output.shape == inputs[0].shape
    assert all(grad.shape == x.shape for grad, x in zip(gradients(output, inputs), inputs, strict=True))


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_kernel_with_another_window_is_found_out(
    kernels: None, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """At the first call, as no machine here has the kernels: a token more than asked for, and the right number."""
    known = attention._before

    def problem_of(trial: Callable[[], None]) -> str | None:
        monkeypatch.setattr(
            attention, "_before", lambda size: (known(size)[0] + wrong * (size is not None), 0)
        )
        try:
            attention._check_window("varlen", torch.arange(1.0, 4.0).view(1, 3, 1, 1).expand(1, 3, 1, 8))
        except ValueError as error:
            return str(error)
        return None

    monkeypatch.setattr(attention, "gpu_lacks", lambda what: None)
    monkeypatch.setattr(attention, "problem_of", problem_of)
    model = tiny_config(attention="varlen", sliding_window=3, head_dim=8).model
    if not wrong:
        assert attention_backend(model, "bf16") == ("varlen", "as configured")
        return
    with pytest.raises(
        ConfigError, match=r"model\.attention = 'varlen': must be sdpa .* another sliding window"
    ):
        attention_backend(model, "bf16")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"sliding_window": 0}, "model.sliding_window = 0: must be at least 1"),
        ({"window_layers": [1]}, r"model.window_layers = \[1\]: must be null without model.sliding_window"),
        ({"sliding_window": 4, "window_layers": []}, r"model.window_layers = \[\]: must be some layers"),
        (
            {"sliding_window": 4, "window_layers": [0, 4]},
            "model.window_layers = 4: must be a layer from 0 to 3",
        ),
    ],
)
def test_what_cannot_be_is_refused(model: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny_config("dense", **model)


def test_all_layers_have_it_unless_some_are_named() -> None:
    model = tiny_config("dense", sliding_window=4).model
    assert model.window_layers == [0, 1, 2, 3]
    some = tiny_config("dense", sliding_window=4, window_layers=[2, 0, 2]).model
    assert [some.window_of(layer) for layer in range(4)] == [4, None, 4, None]
    assert tiny_config("dense").model.window_of(0) is None


assert sum(LENGTHS) == POSITIONS.shape[1]
