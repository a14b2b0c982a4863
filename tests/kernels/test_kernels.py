"""Triton's kernels against the same mathematics in float64: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.networks import param_maker
from tests.helpers.tiny import ROOT, tiny_config

pytest.importorskip("triton", reason="triton is not installed (requirements-dev.txt)")

from megadyn.kernels import cross_entropy, distances
from megadyn.kernels.norm import GROUP, add_norm
from megadyn.kernels.rope import turn
from megadyn.kernels.rows import add_rows, repeat_or_replace, scale_rows, take_rows
from megadyn.kernels.swiglu import swiglu
from megadyn.kinds.dtf import prior
from megadyn.model.rope import _turned

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
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (3, 40), (2, 1100)])
def test_rows_are_multiplied_by_their_numbers(rows, width, dtype):
    leaves = [drawn(rows, width, dtype=dtype, seed=1), drawn(rows, dtype=torch.float32, seed=3)]
    found = run_both(lambda x, gate: [scale_rows(x, gate)], lambda x, gate: [x * gate.unsqueeze(1)], leaves)
    for (got, want), kind in zip(found, (dtype, dtype, torch.float32), strict=True):
        agree(got, want, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "chosen", "heads", "head", "repeats"), [(5, 0, 2, 4, 1), (6, 6, 1, 8, 3), (7, 3, 3, 40, 10)]
)
def test_heads_are_repeated_or_replaced(rows, chosen, heads, head, repeats, dtype):
    place = places(rows, chosen)
    leaves = [
        drawn(rows, heads * head, dtype=dtype, seed=1),
        drawn(chosen, heads * head * repeats, dtype=dtype, seed=2),
    ]

    def exact(x, update):
        copies = x.unflatten(1, (heads, head)).repeat_interleave(repeats, dim=1).flatten(1)
        return [copies.index_copy(0, place, update)]

    for got, want in run_both(lambda x, update: [repeat_or_replace(x, place, update, head)], exact, leaves):
        agree(got, want, dtype)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 8), (3, 1000), (2, 2, 1024), (0, 8)])
def test_swiglu_and_its_gradients(size, dtype):
    leaves = [drawn(*size, dtype=dtype, seed=1), drawn(*size, dtype=dtype, seed=2)]

    def exact(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.silu(gate) * up]

    for got, want in run_both(lambda gate, up: [swiglu(gate, up)], exact, leaves):
        agree(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 4), (3, 24), (16, 128), (5, 256)])
@pytest.mark.parametrize("own_angles", [False, True], ids=["by position", "by token"])
def test_heads_are_turned_and_their_gradients_turned_back(heads, head_dim, own_angles, dtype):
    batch, length = 2, 3
    angle = torch.randn(
        *[batch] * own_angles, length, head_dim // 2, generator=torch.Generator().manual_seed(4)
    )
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)

    def exact(x):
        return [_turned(x, cos.double().unsqueeze(-2), sin.double().unsqueeze(-2))]

    leaves = [drawn(batch, length, heads, head_dim, dtype=dtype, seed=1)]
    for got, want in run_both(lambda x: [turn(x, cos, sin)], exact, leaves):
        agree(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(("softcap", "z_weight"), [(None, 0.0), (2.0, 0.3)])
def test_logits_in_blocks_have_the_sums_and_gradient_of_all(monkeypatch, softcap, z_weight, rows, dtype):
    """Blocks of 3 and 38 words, the second in pieces of 16; one label in each block, one before and one after them."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 16)
    low, high = drawn(rows, 41, dtype=dtype, seed=1)
    logits = high if softcap is None else softcap * (high / softcap).tanh()
    labels = torch.tensor([-2, 41, 1, 3, 40][:rows], dtype=torch.int64, device=DEVICE)
    top = torch.full((rows,), torch.finfo(torch.float32).min, device=DEVICE)
    sums = top, torch.zeros_like(top), torch.full_like(top, 7.0)
    blocks = [(first, low[:, first:stop].detach().contiguous()) for first, stop in ((0, 3), (3, 41))]
    for first, block in blocks:
        cross_entropy.scan(block, labels, first, sums, softcap)
    log_total = sums[0] + sums[1].log()
    want = logits.logsumexp(dim=1)
    assert_close(log_total.double(), want, rtol=1e-6, atol=1e-6)
    found = logits.gather(1, labels.clamp(0, 40).unsqueeze(1)).squeeze(1)
    inside = (labels >= 0) & (labels < 41)
    assert_close(sums[2].double(), torch.where(inside, found, 7.0), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad((want - found * inside + z_weight * want.square()).sum(), high)
    got = [
        cross_entropy.into_gradient(block, labels, first, log_total, softcap, z_weight)
        for first, block in blocks
    ]
    assert got[1].data_ptr() == blocks[1][1].data_ptr()
    agree(torch.cat(got, dim=1), grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "inner"), [(0, 8, 2), (7, 40, 6), (3, 1024, 64), (2, 1100, 1030)]
)  # 1030: more than one block
def test_distances_and_the_gradients_of_a_prediction(rows, width, inner, dtype):
    """Against the same functions in torch's operations, which are held to the formulas in tests/routing/test_scores.py."""

    def tensors(seed, count, *shape, dtype=dtype):
        found = [drawn(*shape, dtype=dtype, seed=seed + step) for step in range(count)]
        return zip(*((low.detach(), high.detach()) for low, high in found), strict=True)

    (x, post, predicted), exact = tensors(1, 3, rows, width)
    got = distances.distances(x, post, predicted.clone(), EPS)
    for found, want, kind in zip(
        got, prior.distances(*exact, EPS), (*2 * [torch.float32], dtype, torch.float32), strict=True
    ):
        agree(found, want, kind)

    (*narrow,), exact_narrow = tensors(4, 3, rows, inner)
    (*factors,), exact_factors = tensors(7, 3, rows, dtype=torch.float32)
    got = distances.inner_gradients(*narrow, *factors, width)
    for found, want, kind in zip(
        got,
        prior.inner_gradients(*exact_narrow, *exact_factors, width),
        (*3 * [dtype], torch.float32),
        strict=True,
    ):
        agree(found, want, kind)

    (error, pulled), exact_wide = tensors(10, 2, rows, width)
    got = distances.outer_gradients(x, post, error, pulled, *factors)
    for found, want in zip(got, prior.outer_gradients(*exact[:2], *exact_wide, *exact_factors), strict=True):
        agree(found, want, dtype)


def test_a_prior_takes_its_kernels(monkeypatch):
    """Results and gradients of kernels and torch's operations are equal, and each kernel is taken."""
    taken = []

    def counted(name):
        run = getattr(distances, name)
        monkeypatch.setattr(distances, name, lambda *inputs: taken.append(name) or run(*inputs))

    names = ["distances", "inner_gradients", "outer_gradients"]
    for name in names:
        counted(name)
    model = prior.Prior("prior", 24, 6, EPS, make=param_maker(tiny_config()))
    model = model.float().to(DEVICE)
    inputs = [drawn(2, 3, 24, dtype=torch.float32, seed=seed)[0] for seed in (1, 2)]
    grads = [
        torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        for shape in ((2, 3), (2, 3), ())
    ]
    found = []
    for uses in (True, False):
        monkeypatch.setattr(prior, "fused", lambda x, uses=uses: uses)
        outputs = model(*inputs)
        found.append([*outputs, *torch.autograd.grad(outputs, [*inputs, *model.parameters()], grads)])
    assert taken == names
    assert_close(*found, rtol=1e-5, atol=1e-6)


COMPILE = """
import subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megadyn.kernels import cross_entropy, distances, norm, rope, rows, swiglu
from megadyn.kernels.rule import LARGEST_WIDTH as WIDTH

def build(kernel, warps=4, **constants):
    names = kernel.arg_names
    kinds = {name: f"*{pointers[name]}" if name in pointers else numbers.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in constants.items()},
                       {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in pointers})
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        used = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True,
                              text=True).stdout
    assert "STACK:0 " in used and "LOCAL:0 " in used, f"{kernel} spills with {constants}: {used}"

pointers = dict.fromkeys("source target x u w h y update out grad_out grad_update grad_y grad_h grad_x gate up grad_gate "
                         "grad_up logits grad post predicted error pulled grad_post inner for_weights for_input".split(), "bf16")
numbers = {"width": "i32", "rows": "i32", "eps": "fp32", "size": "i32", "angles": "i32", "heads": "i32", "half": "i32",
           "head": "i32", "repeats": "i32",
           "words": "i32", "first": "i32", "softcap": "fp32", "z_weight": "fp32"}
build(swiglu._forward, BLOCK=swiglu.BLOCK)
build(swiglu._backward, BLOCK=swiglu.BLOCK)
pointers |= dict.fromkeys("static change inverse of_weights of_input of_static of_change along".split(), "fp32")
build(distances._distances, BLOCK=1024)
build(distances._outer_gradients, BLOCK=1024)
for block in (128, 1024):
    build(distances._inner_gradients, ROWS=distances.TILE // block, BLOCK=block)
pointers |= dict.fromkeys(("gate", "inverse", "grad_w", "grad_gate", "cos", "sin"), "fp32") | {"place": "i64", "slot": "i32"}
pointers |= dict.fromkeys(("top", "total", "log_total"), "fp32") | {"labels": "i64", "target": "bf16"}
for flag in (True, False):
    build(rows._copy_rows, scatter=flag, BLOCK=1024)
    build(norm._backward, norm.warps_for(WIDTH), has_grad_h=flag, GROUP=norm.GROUP, BLOCK=WIDTH)
    build(rope._turn, back=flag, HEADS=16, HALF=64)
    build(cross_entropy._gradient, cross_entropy.WARPS, has_cap=flag, BLOCK=cross_entropy.BLOCK)
pointers["target"] = "fp32"
for flag in (True, False):
    build(cross_entropy._scan, cross_entropy.WARPS, has_cap=flag, BLOCK=cross_entropy.BLOCK)
build(rows._add_rows, BLOCK=1024)
build(rows._add_rows_backward, BLOCK=1024)
build(rows._repeat_or_replace, BLOCK=1024)
build(rows._repeat_or_replace_backward, BLOCK=1024)
build(rows._scale_rows, BLOCK=1024)
build(rows._scale_rows_backward, BLOCK=1024)
build(norm._forward, norm.warps_for(WIDTH), BLOCK=WIDTH)
try:
    build(norm._forward, 1, BLOCK=8192)
except AssertionError:
    pass
else:
    raise AssertionError("256 numbers of each thread must spill, or else this program cannot see it")
"""


def test_every_kernel_compiles_without_spills_for_a_gpu_that_is_not_there(tmp_path):
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
