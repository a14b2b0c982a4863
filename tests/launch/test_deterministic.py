"""The same bits each time: what is switched, and what is refused."""

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megadyn.errors import ConfigError
from megadyn.launch.deterministic import VARIABLE, be_deterministic
from megadyn.model.attention import causal_attention
from megadyn.model.documents import segments_of
from megadyn.routing.surprise import moving_average


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_it_is_switched_on_and_off() -> None:
    be_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ[VARIABLE] == ":4096:8"
    be_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_is_set_stays_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    be_deterministic(True)
    assert os.environ[VARIABLE] == ":16:8"
    monkeypatch.setenv(VARIABLE, ":0:0")
    with pytest.raises(ConfigError) as caught:
        be_deterministic(True)
    assert str(caught.value) == (
        "CUBLAS_WORKSPACE_CONFIG = ':0:0': must be :4096:8 or :16:8, or unset, with training.deterministic"
    )


@pytest.mark.parametrize("length", [1, 2, 64, 77])
def test_running_sums_without_a_scan_are_torchs(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, length)
    want = moving_average(x, 5)
    be_deterministic(True)
    monkeypatch.setattr(torch.Tensor, "cumsum", None, raising=False)  # on a GPU it raises an error
    assert_close(moving_average(x, 5), want)


@pytest.mark.parametrize("is_on", [True, False])
def test_flash_attention_is_asked_for_a_fixed_order(is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attention(q: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        asked.append(options.get("deterministic", False))
        return q

    package = SimpleNamespace(flash_attn_func=attention, flash_attn_varlen_func=attention)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    be_deterministic(is_on)
    q = torch.zeros(1, 3, 2, 8)
    for segments in (None, segments_of(torch.tensor([[0, 0, 1]]), 2, 2)):
        causal_attention(q, q, q, "flash", segments)
    assert asked == [is_on, is_on]
