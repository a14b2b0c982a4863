"""Triton's kernels against the same mathematics in float64: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.tiny import ROOT

pytest.importorskip("triton", reason="triton is not installed (requirements-dev.txt)")

from megadyn.kernels.norm import GROUP, add_norm
from megadyn.kernels.rows import add_rows, take_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
SHAPES = [(7, 3, 8), (5, 0, 16), (6, 6, 40), (9, 4, 896), (3, 2, 1024), (4, 1, 3584)]
"""Rows, of which so many are chosen, and columns."""
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of one number; sums are in float32."""


def drawn(*shape, dtype, seed):
    """Random numbers of `dtype`, and the same as a float64 leaf."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(DEVICE).requires_grad_(), x.double().to(DEVICE).requires_grad_()


def places(rows, chosen, seed=5):
    return (
        torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:chosen].sort().values.to(DEVICE)
    )


def agree(got, want, dtype):
    assert got.dtype == dtype
    scale = want.abs().max().item() if want.numel() else 1.0
    assert_close(got.double(), want, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype] * scale)


def run_both(function, exact, leaves, grad_seeds=(11, 12)):
    """Outputs and gradients of `function` on the leaves of low precision and of `exact` on the float64 ones."""
    found = []
    for run, inputs in ((function, [low for low, _ in leaves]), (exact, [high for _, high in leaves])):
        outputs = run(*inputs)
        grads = [
            torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(out)
            for out, seed in zip(outputs, grad_seeds)
        ]
        found.append((outputs, torch.autograd.grad(outputs, inputs, grads)))
    return zip(*((*outputs, *grads) for outputs, grads in found), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "chosen", "width"), SHAPES)
def test_taken_rows_and_their_gradients_are_exact(rows, chosen, width, dtype):
    place = places(rows, chosen)
    leaves = [drawn(rows, width, dtype=dtype, seed=1)]
    for got, want in run_both(lambda x: [take_rows(x, place)], lambda x: [x[place]], leaves):
        assert torch.equal(got.double(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "chosen", "width"), SHAPES)
def test_rows_are_put_back_times_their_gates(rows, chosen, width, dtype):
    place = places(rows, chosen)
    x, gate, update = (
        drawn(rows, width, dtype=dtype, seed=1),
        drawn(rows, dtype=torch.float32, seed=3),
        drawn(chosen, width, dtype=dtype, seed=2),
    )

    def exact(x, gate, update):
        return [x.index_add(0, place, gate[place].unsqueeze(1) * update)]

    found = list(
        run_both(lambda x, gate, update: [add_rows(x, place, gate, update)], exact, [x, gate, update])
    )
    for (got, want), kind in zip(found, (dtype, dtype, torch.float32, dtype), strict=True):
        agree(got, want, kind)
    untouched = torch.ones(rows, dtype=torch.bool, device=DEVICE).index_fill(0, place, False)
    (out, _), _, (grad_gate, _), _ = found
    assert torch.equal(out[untouched], x[0][untouched])
    assert not grad_gate[untouched].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (GROUP + 1, 40), (3, 896), (2, 1024), (2, 3584), (0, 8)])
def test_sum_and_norm_in_one_pass(rows, width, dtype):
    leaves = [
        drawn(rows, width, dtype=dtype, seed=1),
        drawn(rows, width, dtype=dtype, seed=2),
        drawn(width, dtype=dtype, seed=3),
    ]

    def exact(x, u, w):
        total = x + u
        stored = total + (total.to(dtype).double() - total).detach()  # what is normed is what is handed on
        return [stored, stored / (stored.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * w]

    for got, want in run_both(lambda x, u, w: add_norm(x, u, w, EPS), exact, leaves):
        agree(got, want, dtype)


def test_a_norm_whose_sum_nobody_uses_has_its_gradient_and_the_reverse():
    shapes = [(5, 8), (5, 8), (8,)]
    (x, x64), (u, u64), (w, w64) = (
        drawn(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes)
    )
    for part in (0, 1):
        got = torch.autograd.grad(add_norm(x, u, w, EPS)[part].square().sum(), (x, u), retain_graph=True)
        total = x64 + u64
        exact = (total, torch.nn.functional.rms_norm(total, (8,), w64, EPS))[part]
        want = torch.autograd.grad(exact.square().sum(), (x64, u64))
        assert_close([grad.double() for grad in got], list(want), rtol=1e-5, atol=1e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megadyn.kernels import norm, rows

def build(kernel, pointers, numbers, constants):
    names = kernel.arg_names
    signature = {name: f"*{pointers[name]}" if name in pointers else numbers.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(binary.asm["cubin"]) > 1000, kernel

wide = dict.fromkeys(("source", "target", "x", "u", "w", "h", "y", "update", "out", "grad_out", "grad_update", "grad_y", "grad_h",
                      "grad_x"), "bf16")
wide |= {"gate": "fp32", "inverse": "fp32", "grad_w": "fp32", "grad_gate": "fp32", "place": "i64", "slot": "i32"}
numbers = {"width": "i32", "rows": "i32", "eps": "fp32"}
for flag in (True, False):
    build(rows._copy_rows, wide, numbers, {"scatter": flag, "BLOCK": 1024})
    build(norm._backward, wide, numbers, {"has_grad_h": flag, "GROUP": norm.GROUP, "BLOCK": 4096})
build(rows._add_rows, wide, numbers, {"BLOCK": 1024})
build(rows._add_rows_backward, wide, numbers, {"BLOCK": 1024})
build(norm._forward, wide, numbers, {"BLOCK": 4096})
"""


def test_every_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    program = tmp_path / "compile_kernels.py"
    program.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
