"""Mean squared distances of new states from old ones and from a narrow SwiGLU's prediction of their change, and the gradients
that this needs, in one pass each. Import only if Triton can run.

    update = post - x    error = update - predicted    static = mean(update^2)    change = mean(error^2)

N tokens of width D, a prediction of inner width W. Computed in float32 and rounded once, when a result is stored. Rows are
read in blocks, so no width is too large. What calls these functions has the same in torch's operations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadyn.kernels.launch import has_values
from megadyn.kernels.rows import block_of

TILE = 1024
"""Numbers of the inner width that one program reads at once, of several rows if they are short."""


@triton.jit
def _distances(x, post, predicted, static, change, inverse, width, eps, BLOCK: tl.constexpr):
    """A row per program. The error takes the place of `predicted`; inverse = 1 / sqrt(mean(x^2) + eps)."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits, because N * D may exceed 2^31
    of_update = tl.zeros((BLOCK,), dtype=tl.float32)
    of_error = tl.zeros((BLOCK,), dtype=tl.float32)
    of_x = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        at = row * width + column
        old = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        update = tl.load(post + at, mask=inside, other=0.0).to(tl.float32) - old
        error = update - tl.load(predicted + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(predicted + at, error.to(predicted.dtype.element_ty), mask=inside)
        of_update += update * update
        of_error += error * error
        of_x += old * old
    tl.store(static + row, tl.sum(of_update, axis=0) / width)
    tl.store(change + row, tl.sum(of_error, axis=0) / width)
    tl.store(inverse + row, 1 / tl.sqrt(tl.sum(of_x, axis=0) / width + eps))


@triton.jit
def _inner_gradients(
    gate,
    up,
    grad,
    of_weights,
    of_input,
    inverse,
    inner,
    for_weights,
    for_input,
    along,
    rows,
    width,
    size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows per program. With (d_gate, d_up) the gradients of silu(gate) * up for -grad, and of_weights, of_input and
    inverse numbers of the row: inner = of_weights silu(gate) up, for_weights = of_weights inverse (d_gate, d_up), for_input =
    of_input inverse (d_gate, d_up), along = of_input inverse^2 sum(d_gate gate + d_up up) / size."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    scale = tl.load(inverse + row, mask=here, other=0.0)
    of_input_row = tl.load(of_input + row, mask=here, other=0.0) * scale
    of_weights_row = tl.load(of_weights + row, mask=here, other=0.0)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = here[:, None] & (column < width)
        at = row[:, None] * width + column
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        d = -tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(g)
        silu = g * share
        d_gate = d * u * (share + silu * (1 - share))
        d_up = d * silu
        total += d_gate * g + d_up * u
        kept = of_weights_row[:, None] * silu * u
        tl.store(inner + at, kept.to(inner.dtype.element_ty), mask=inside)
        both = row[:, None] * 2 * width + column
        kind = for_input.dtype.element_ty
        tl.store(for_input + both, (of_input_row[:, None] * d_gate).to(kind), mask=inside)
        tl.store(for_input + both + width, (of_input_row[:, None] * d_up).to(kind), mask=inside)
        factor = (of_weights_row * scale)[:, None]
        tl.store(for_weights + both, (factor * d_gate).to(kind), mask=inside)
        tl.store(for_weights + both + width, (factor * d_up).to(kind), mask=inside)
    tl.store(along + row, tl.sum(total, axis=1) * of_input_row * scale / size, mask=here)


@triton.jit
def _outer_gradients(
    x, post, error, pulled, of_static, of_change, along, grad_post, width, BLOCK: tl.constexpr
):
    """A row per program: grad_post = of_static update + of_change error. The gradient of x, which is pulled - grad_post -
    along x, takes the place of `pulled`."""
    row = tl.program_id(0).to(tl.int64)
    by_static = tl.load(of_static + row)
    by_change = tl.load(of_change + row)
    by_x = tl.load(along + row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        at = row * width + column
        old = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        update = tl.load(post + at, mask=inside, other=0.0).to(tl.float32) - old
        grad = by_static * update + by_change * tl.load(error + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_post + at, grad.to(grad_post.dtype.element_ty), mask=inside)
        grad = tl.load(pulled + at, mask=inside, other=0.0).to(tl.float32) - grad - by_x * old
        tl.store(pulled + at, grad.to(pulled.dtype.element_ty), mask=inside)


def distances(
    x: Tensor, post: Tensor, predicted: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, post and predicted [N, D] -> static and change [N], the error [N, D] in the place of `predicted`, and 1 / rms(x) [N].

    All but the error are in float32. No gradients.
    """
    x, post, predicted = x.contiguous(), post.contiguous(), predicted.contiguous()
    rows, width = x.shape
    static, change, inverse = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(3))
    if rows and has_values(x, moved=4 * x.nbytes + 3 * static.nbytes):
        _distances[(rows,)](x, post, predicted, static, change, inverse, width, eps, BLOCK=block_of(width))
    return static, change, predicted, inverse


def inner_gradients(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    of_weights: Tensor,
    of_input: Tensor,
    inverse: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What backward through a prediction needs at its inner width, for gradient -grad [N, W] of silu(gate) * up.

    Args:
        of_weights, of_input: [N], factors of the gradients of the weights and of the input.
        inverse: [N], 1 / rms(x) of the prediction's input x.
        size: D.

    Returns:
        of_weights silu(gate) up [N, W]; the gradients of (gate, up) times `inverse` and of_weights, and times `inverse` and
        of_input, both [N, 2 W]; and the factor [N] of x in the gradient of x, because x is normed.
    """
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    rows, width = gate.shape
    inner, along = torch.empty_like(gate), torch.empty_like(inverse)
    for_weights, for_input = gate.new_empty(rows, 2 * width), gate.new_empty(rows, 2 * width)
    if rows and has_values(gate, moved=8 * gate.nbytes + 4 * along.nbytes):
        block = block_of(width)
        tile = max(1, TILE // block)
        _inner_gradients[(triton.cdiv(rows, tile),)](
            gate,
            up,
            grad,
            of_weights,
            of_input,
            inverse,
            inner,
            for_weights,
            for_input,
            along,
            rows,
            width,
            size,
            ROWS=tile,
            BLOCK=block,
        )
    return inner, for_weights, for_input, along


def outer_gradients(
    x: Tensor,
    post: Tensor,
    error: Tensor,
    pulled: Tensor,
    of_static: Tensor,
    of_change: Tensor,
    along: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in the place of `pulled`, and of post, [N, D].

    Args:
        pulled: [N, D], what comes back through the prediction's products.
        of_static, of_change: [N], factors of update and error.
        along: [N], from `inner_gradients`.
    """
    x, post, error, pulled = (tensor.contiguous() for tensor in (x, post, error, pulled))
    rows, width = x.shape
    grad_post = torch.empty_like(x)
    if rows and has_values(x, moved=6 * x.nbytes + 3 * along.nbytes):
        _outer_gradients[(rows,)](
            x,
            post,
            error,
            pulled,
            of_static,
            of_change,
            along,
            grad_post,
            width,
            BLOCK=block_of(width),
        )
    return pulled, grad_post
