"""Choosing tokens, taking them out and putting their updates back, against loops."""

import pytest
import torch

from megadyn.kinds import capacity_count
from megadyn.model.block import Stream
from megadyn.model.documents import documents_of
from megadyn.routing.select import (
    Selection,
    as_mask,
    choose_top,
    choose_where,
    origins,
    put_back,
    put_back_gated,
    repeat_or_replace,
    take,
    take_out,
)


@pytest.mark.parametrize(
    ("capacity", "length", "count"),
    [(0.5, 24, 12), (0.5, 7, 3), (0.125, 100, 12), (1.0, 9, 9), (0.1, 5, 1), (1e-6, 5, 1), (0.999, 10, 9)],
)
def test_the_capacity_is_rounded_down_and_at_least_one(capacity, length, count):
    assert capacity_count(capacity, length) == count


def naive_top(row: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(row)), key=lambda t: (-row[t], t))[:count])


@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_highest_are_chosen_from_each_sequence_of_equal_ones_the_first(count):
    score = torch.randint(0, 4, (50, 10), generator=torch.Generator().manual_seed(0)).float()  # full of ties
    places, sequences = choose_top(score, count)
    assert sequences is None
    assert places.tolist() == [
        [10 * b + t for t in naive_top(row, count)] for b, row in enumerate(score.tolist())
    ]


def test_exactly_as_many_as_asked_are_chosen_where_all_scores_are_equal():
    assert choose_top(torch.ones(2, 1000), 400).places.tolist() == [list(range(400)), list(range(1000, 1400))]


@pytest.mark.parametrize("seed", range(5))
def test_choosing_by_a_mask_lists_the_chosen_and_their_sequences(seed):
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[2] = False
    if seed == 1:
        mask[:] = False
    if seed == 2:
        mask[3] = True
    places, sequences = choose_where(mask)
    want = [(b, t) for b in range(6) for t in range(9) if mask[b, t]]
    assert places.shape == sequences.shape == (1, len(want))
    assert [(place // 9, place % 9) for place in places[0].tolist()] == want
    assert sequences[0].tolist() == [b for b, _ in want]


def test_a_selection_and_its_mask_say_the_same():
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(as_mask(choose_where(mask), mask.shape), mask)
    score = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    top = as_mask(choose_top(score, 4), score.shape)
    assert top.sum(dim=1).tolist() == [4] * 6
    assert torch.equal(choose_where(top).places.view(6, 4), choose_top(score, 4).places)
    assert not as_mask(choose_where(torch.zeros(6, 9, dtype=torch.bool)), mask.shape).any()


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_origins_are_positions_and_segments_of_the_chosen_tokens(documents, ragged):
    tokens = torch.tensor([[5, 0, 7, 7, 0, 3], [1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 1, 1]])
    starts = {0: [0, 2, 5], 1: [0], 2: [0, 1, 2]} if documents else {b: [0] for b in range(3)}
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1]], dtype=torch.bool)
    selection = choose_where(mask) if ragged else choose_top(mask.float(), 4)
    stream = Stream(torch.zeros(3, 6, 2), documents=documents_of(tokens, 0) if documents else None)
    positions, segments = origins(stream, selection, 6)
    chosen = [(b, t, max(s for s in starts[b] if s <= t)) for b, t in mask.nonzero().tolist()]
    assert positions.shape == selection.places.shape
    assert positions.flatten().tolist() == [t - start for _, t, start in chosen]
    if segments is None:
        assert not ragged and not documents
        return
    every = [(b, start) for b in starts for start in starts[b]]
    assert segments.longest == 6
    lengths = [sum((b, start) == run for b, _, start in chosen) for run in every]
    assert segments.ends.tolist() == [sum(lengths[:n]) for n in range(len(every) + 1)]
    assert 0 in lengths or not documents


def draw():
    """x [3, 7, 4], places [3, 4] of four tokens of each sequence, and rows for them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    places = torch.stack([7 * b + torch.randperm(7, generator=generator)[:4].sort().values for b in range(3)])
    return x, places, torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)


def repeated(x, places, rows):
    """Both halves of x twice, beside each other; at `places`, `rows` twice."""
    return repeat_or_replace(x.unflatten(-1, (2, 2)), places, rows.repeat(1, 1, 2))


SHAPES = pytest.mark.parametrize("shape", [(3, 4), (1, 12)], ids=["regular", "ragged"])


@SHAPES
def test_take_put_back_and_replace_equal_loops_and_leave_their_input_alone(shape):
    x, places, rows = draw()
    places, rows = places.view(shape), rows.view(*shape, 4)
    before, added, replaced = x.clone(), x.clone(), x[..., [0, 1, 0, 1, 2, 3, 2, 3]]
    taken, flat = take(x, places), take(x[..., 0], places)
    for b in range(shape[0]):
        for c in range(shape[1]):
            sequence, t = divmod(int(places[b, c]), 7)
            assert torch.equal(taken[b, c], x[sequence, t])
            assert flat[b, c] == x[sequence, t, 0]
            added[sequence, t] += rows[b, c]
            replaced[sequence, t] = rows[b, c].repeat(2)
    assert torch.equal(put_back(x, places, rows), added)
    assert torch.equal(repeated(x, places, rows), replaced)
    assert torch.equal(x, before)


def test_no_token_at_all():
    x, places, rows = draw()
    none = places[:1, :0]
    assert take(x, none).shape == (1, 0, 4)
    assert torch.equal(put_back(x, none, rows[:1, :0]), x)
    assert torch.equal(repeated(x, none, rows[:1, :0]), x[..., [0, 1, 0, 1, 2, 3, 2, 3]])


def test_inputs_that_are_not_contiguous_are_read_right():
    x, places, rows = draw()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(take(turned, places), take(x, places))
    assert torch.equal(put_back(turned, places, rows), put_back(x, places, rows))
    assert torch.equal(repeated(turned, places, rows), repeated(x, places, rows))


def test_gradcheck():
    x, places, rows = draw()
    x.requires_grad_()
    rows.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: take(x, places), (x,))
    assert torch.autograd.gradcheck(lambda x: take(x[..., 0], places), (x,))
    assert torch.autograd.gradcheck(lambda x, rows: put_back(x, places, rows), (x, rows))
    assert torch.autograd.gradcheck(lambda x, rows: repeated(x, places, rows), (x, rows))
    assert torch.autograd.gradcheck(
        lambda x, gate, rows: put_back_gated(x, places, gate, rows),
        (x, x.detach()[..., 1].clone().requires_grad_(), rows),
    )


@SHAPES
def test_what_is_taken_out_sends_its_gradient_with_that_of_the_rest(shape):
    """Also where one of the two is not used, no token is taken, or a gradient is no block of memory of its own."""
    x, places, _ = draw()
    x, places = x.requires_grad_(), places.view(shape)
    assert torch.autograd.gradcheck(lambda x: take_out(x, places), (x,))
    assert torch.autograd.gradcheck(lambda x: take_out(x, places)[0], (x,))
    assert torch.autograd.gradcheck(lambda x: take_out(x, places)[1], (x,))
    assert torch.autograd.gradcheck(lambda x: take_out(x, places[:1, :0]), (x,))
    heads = x.detach().unflatten(-1, (2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: take_out(x, places), (heads,))
    (found,) = torch.autograd.grad(
        take_out(x, places)[0].sum() + take_out(x, places)[1].transpose(0, 1).sum(), x
    )
    assert torch.equal(found, 1 + as_mask(Selection(places), x.shape[:2]).double().unsqueeze(-1).expand_as(x))


def test_gradients_keep_half_precision_and_gates_float32():
    x, places, rows = (part.bfloat16() if part.is_floating_point() else part for part in draw())
    x, rows, gate = x.requires_grad_(), rows.requires_grad_(), torch.rand(3, 7).requires_grad_()
    all_of_it, taken = take_out(x, places)
    out = put_back_gated(all_of_it, places, gate, taken * rows)
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    assert (x.grad.dtype, rows.grad.dtype, gate.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert not torch.equal(gate.grad, gate.grad.bfloat16().float()), "rounded to bf16 on the way"
