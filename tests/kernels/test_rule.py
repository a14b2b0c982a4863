"""Which kernels run, and that a network computes the same with them."""

import pytest
import torch
from torch.testing import assert_close

from megadyn.errors import ConfigError
from megadyn.kernels import rule
from megadyn.kinds.dtf import prior
from megadyn.model import block, norm, rope
from megadyn.parallel import loss as loss_module
from megadyn.routing import select
from tests.helpers.networks import gradients, make_network
from tests.helpers.tiny import tiny_config, tiny_tokens


@pytest.fixture
def gpu(monkeypatch):
    """A machine as the rule sees it, with a GPU of compute capability 9.0 and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(rule._Process, "uses_triton", False)
    monkeypatch.setattr(rule, "_launch_triton", lambda: None)
    return monkeypatch


def test_auto_takes_triton_where_it_can_run(gpu):
    assert rule.use_kernels("auto", 64) == ("triton", "auto: a first kernel ran")
    assert rule._Process.uses_triton
    assert rule.use_kernels("torch", 64) == ("torch", "as configured")
    assert not rule._Process.uses_triton


def test_a_model_too_wide_for_the_norm_s_kernel_says_so(gpu):
    assert rule.use_kernels("triton", 8192) == ("triton", "as configured")
    assert rule.use_kernels("triton", 8256) == (
        "triton",
        "as configured; norms by torch, because 8256 columns are more than the 8192 of a kernel",
    )
    assert rule.use_kernels("torch", 8256) == ("torch", "as configured")


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        (lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False), "no CUDA device"),
        (
            lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5)),
            "compute capability 8.0",
        ),
        (
            lambda patch: patch.setattr(rule.importlib.util, "find_spec", lambda name: None),
            r"pip install triton",
        ),
        (
            lambda patch: patch.setattr(rule, "_launch_triton", lambda: 1 / 0),
            r"a first Triton kernel failed \(ZeroDivisionError: .*"
            "it needs a C compiler and Python's headers",
        ),
    ],
)
def test_where_triton_cannot_run_auto_says_why_and_asking_for_it_is_an_error(gpu, missing, why):
    missing(gpu)
    with pytest.raises(
        ConfigError, match=rf"training.kernels = 'triton': must be torch on this machine: .*{why}"
    ):
        rule.use_kernels("triton", 64)
    chosen, reason = rule.use_kernels("auto", 64)
    assert chosen == "torch"
    assert reason.startswith("auto: ")


def test_kernels_take_cuda_tensors_only_and_those_without_values(gpu):
    rule.use_kernels("triton", 64)
    assert not rule.fused(torch.zeros(2, 2))
    assert rule.fused(torch.zeros(2, 2, device="meta"))
    with rule.counting("torch"):
        assert not rule.fused(torch.zeros(2, 2, device="meta"))
    assert rule.fused(torch.zeros(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("kind", "norms"), [("dense", "lns"), ("dtf", "pre"), ("mod", "hybridnorm"), ("dtrnet-token", "pre")]
)
def test_a_network_computes_the_same_with_triton_s_kernels(kind, norms, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed (requirements-dev.txt)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = tiny_tokens(1, samples=2, length=12)[0].to(device)
    losses, grads = [], []
    for with_kernels in (False, True):
        calls = []
        for module in (norm, select, block, rope, loss_module, prior):
            monkeypatch.setattr(
                module, "fused", lambda x, calls=calls, on=with_kernels: calls.append(x.shape) or on
            )
        network = make_network(tiny_config(kind, normalization=norms, num_layers=2), dtype=torch.float32).to(
            device
        )
        loss = network(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        assert calls
        losses.append(loss.detach())
        grads.append(gradients(network))
    assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for name, want in grads[0].items():
        size = want.abs().max().item()
        assert_close(
            grads[1][name], want, rtol=1e-4, atol=1e-4 * size, msg=lambda text, of=name: f"{of}: {text}"
        )
