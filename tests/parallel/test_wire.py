"""Hidden state and gate in one tensor: not a bit is lost, neither in value nor in gradient."""

import pytest
import torch
from torch import Tensor

from megadyn.parallel import wire
from megadyn.parallel.wire import pack

HIDDEN_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def gate_dtype(hidden: torch.dtype) -> torch.dtype:
    return torch.promote_types(hidden, torch.float32)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    hidden, gate, ids = wire.unpack(packed, gate=True, ids=False)
    assert ids is None
    return hidden, gate


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_hidden_and_gate_come_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    hidden, gate = torch.randn(2, 5, 8).to(dtype), torch.rand(2, 5, dtype=gate_dtype(dtype))
    gate[0, 0] = 1 / 3  # full of bits that a half precision would round away
    packed = pack(hidden, gate)
    assert packed.dtype == dtype
    assert packed.shape == (2, 5, 8 + gate.dtype.itemsize // dtype.itemsize)
    got_hidden, got_gate = unpack(packed)
    assert got_gate.dtype == gate.dtype
    assert torch.equal(bits(got_hidden), bits(hidden))
    assert torch.equal(bits(got_gate), bits(gate))


def test_bit_patterns_that_are_no_numbers_in_half_precision_survive():
    """A float32's lower half may read as a bfloat16 NaN, infinity or subnormal."""
    patterns = torch.tensor([0x3F807FC0, 0x3F80FFFF, 0x3F807F80, 0x3F800001, 0x00000001], dtype=torch.int32)
    gate = patterns.view(torch.float32).unsqueeze(0)
    for dtype in (torch.bfloat16, torch.float16):
        _, got = unpack(pack(torch.zeros(1, 5, 4, dtype=dtype), gate))
        assert torch.equal(got.view(torch.int32), gate.view(torch.int32))


@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_gradients_come_back_bit_for_bit(dtype):
    torch.manual_seed(1)
    hidden = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    gate = torch.rand(2, 5, dtype=gate_dtype(dtype)).requires_grad_()
    sent = pack(hidden, gate)
    received = sent.detach().requires_grad_()  # as on the next pipeline stage
    grad_hidden, grad_gate = torch.randn(2, 5, 8).to(dtype), torch.randn(2, 5, dtype=gate.dtype)
    torch.autograd.backward(unpack(received), (grad_hidden, grad_gate))
    assert received.grad.dtype == dtype
    sent.backward(received.grad)
    assert torch.equal(bits(hidden.grad), bits(grad_hidden))
    assert torch.equal(bits(gate.grad), bits(grad_gate))


@pytest.mark.parametrize("used", [0, 1])
def test_the_part_that_the_next_stage_does_not_use_gets_a_zero_gradient(used):
    hidden, gate = (
        torch.randn(1, 3, 4, dtype=torch.bfloat16).requires_grad_(),
        torch.rand(1, 3).requires_grad_(),
    )
    part = unpack(pack(hidden, gate))[used]
    grad = torch.randn_like(part)
    part.backward(grad)
    assert torch.equal((hidden, gate)[used].grad, grad)
    assert not (hidden, gate)[1 - used].grad.any()


def test_a_gate_that_is_not_contiguous_is_packed_right():
    gate = torch.rand(5, 2).T
    hidden = torch.randn(5, 2, 4).transpose(0, 1)
    got_hidden, got_gate = unpack(pack(hidden, gate))
    assert torch.equal(got_gate, gate)
    assert torch.equal(got_hidden, hidden)


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_document_ids_come_along_and_have_no_gradient(dtype, with_gate):
    torch.manual_seed(2)
    hidden = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    gate = torch.rand(2, 5, dtype=gate_dtype(dtype)).requires_grad_() if with_gate else None
    ids = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 70_000, 2**30, 2**31 - 1]])
    sent = pack(hidden, gate, ids)
    received = sent.detach().requires_grad_()
    got_hidden, got_gate, got_ids = wire.unpack(received, gate=with_gate, ids=True)
    assert torch.equal(got_ids, ids)
    assert not got_ids.requires_grad
    assert torch.equal(bits(got_hidden), bits(hidden.detach()))
    grads = [torch.randn(2, 5, 8).to(dtype), torch.randn(2, 5, dtype=gate_dtype(dtype))]
    torch.autograd.backward((got_hidden, got_gate) if with_gate else (got_hidden,), grads[: 1 + with_gate])
    sent.backward(received.grad)
    assert torch.equal(bits(hidden.grad), bits(grads[0]))
    assert gate is None or torch.equal(bits(gate.grad), bits(grads[1]))


def test_nothing_to_pack_sends_the_hidden_state_itself():
    hidden = torch.randn(2, 5, 8)
    assert pack(hidden) is hidden
    assert wire.unpack(hidden, gate=False, ids=False) == (hidden, None, None)
