"""Choosing tokens, taking them out and putting their updates back, against loops."""

import pytest
import torch

from megadyn.config import capacity_count
from megadyn.routing.select import Selection, as_mask, choose_top, choose_where, put_back, replace, take


@pytest.mark.parametrize(("capacity", "length", "count"), [
    (0.5, 24, 12), (0.5, 7, 3), (0.125, 100, 12), (1.0, 9, 9), (0.1, 5, 1), (1e-6, 5, 1), (0.999, 10, 9)])
def test_the_capacity_is_rounded_down_and_at_least_one(capacity, length, count):
    assert capacity_count(capacity, length) == count


def naive_top(row: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(row)), key=lambda t: (-row[t], t))[:count])


@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_highest_are_chosen_from_each_sequence_of_equal_ones_the_first(count):
    score = torch.randint(0, 4, (50, 10), generator=torch.Generator().manual_seed(0)).float()      # full of ties
    chosen = choose_top(score, count)
    assert chosen.valid is None
    assert chosen.positions.tolist() == [naive_top(row, count) for row in score.tolist()]


def test_exactly_as_many_as_asked_are_chosen_where_all_scores_are_equal():
    assert choose_top(torch.ones(2, 1000), 400).positions.tolist() == [list(range(400))] * 2


@pytest.mark.parametrize("seed", range(5))
def test_choosing_by_a_mask_puts_padding_behind_the_chosen(seed):
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[2] = False
    if seed == 1:
        mask[:] = False
    if seed == 2:
        mask[3] = True
    index, valid = choose_where(mask)
    assert index.shape == valid.shape == (6, max(1, int(mask.sum(dim=1).max())))
    for row in range(6):
        want = mask[row].nonzero().flatten().tolist()
        assert index[row].tolist()[: len(want)] == want
        assert valid[row].tolist() == [True] * len(want) + [False] * (index.shape[1] - len(want))
        assert len(set(index[row].tolist())) == index.shape[1], "padding must not stand on a chosen token"


def test_a_selection_and_its_mask_say_the_same():
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(as_mask(choose_where(mask), 9), mask)
    score = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    top = as_mask(choose_top(score, 4), 9)
    assert top.sum(dim=1).tolist() == [4] * 6
    assert torch.equal(choose_where(top).positions, choose_top(score, 4).positions)
    assert not as_mask(Selection(torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6, 1, dtype=torch.bool)), 9).any()


def draw():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(7, generator=generator)[:4].sort().values for _ in range(3)])
    return x, index, torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)


def test_take_equals_a_loop():
    x, index, _ = draw()
    taken, flat = take(x, index), take(x[..., 0], index)
    for b in range(3):
        for c in range(4):
            assert torch.equal(taken[b, c], x[b, index[b, c]])
            assert flat[b, c] == x[b, index[b, c], 0]


def test_put_back_equals_a_loop_and_leaves_its_input_alone():
    x, index, update = draw()
    before, want = x.clone(), x.clone()
    for b in range(3):
        for c in range(4):
            want[b, index[b, c]] += update[b, c]
    assert torch.equal(put_back(x, index, update), want)
    assert torch.equal(x, before)


@pytest.mark.parametrize("valid", [None, torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])],
                         ids=["whole", "padded"])
def test_replace_equals_a_loop_and_leaves_its_input_and_what_padding_stands_on_alone(valid):
    x, index, rows = draw()
    before, want = x.clone(), x.clone()
    for b in range(3):
        for c in range(4):
            if valid is None or valid[b, c]:
                want[b, index[b, c]] = rows[b, c]
    assert torch.equal(replace(x, index, rows, valid), want)
    assert torch.equal(x, before)


def test_inputs_that_are_not_contiguous_are_read_right():
    x, index, update = draw()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(take(turned, index), take(x, index))
    assert torch.equal(put_back(turned, index, update), put_back(x, index, update))
    assert torch.equal(replace(turned, index, update, None), replace(x, index, update, None))


def test_gradcheck_of_take_and_put_back():
    x, index, update = draw()
    x.requires_grad_()
    update.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: take(x, index), (x,))
    assert torch.autograd.gradcheck(lambda x: take(x[..., 0], index), (x,))
    assert torch.autograd.gradcheck(lambda x, update: put_back(x, index, update), (x, update))


@pytest.mark.parametrize("valid", [None, torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])],
                         ids=["whole", "padded"])
def test_gradcheck_of_replace(valid):
    x, index, rows = (part.requires_grad_() if part.is_floating_point() else part for part in draw())
    assert torch.autograd.gradcheck(lambda x, rows: replace(x, index, rows, valid), (x, rows))
    replace(x, index, rows, valid).sum().backward()
    written = torch.ones(3, 4, dtype=torch.bool) if valid is None else valid
    assert torch.equal(rows.grad, written.unsqueeze(-1).expand(3, 4, 4).double()), "padding must get no gradient"
    assert x.grad.sum() == 4 * (21 - written.sum())
