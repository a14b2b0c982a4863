"""DTRNet's auxiliary loss: lambda * sum_l f_l mean(p0_l) / sum_l f_l, with the f_l of the step before."""

import pytest
import torch

from megadyn.kinds.dtrnet.load import AttentionLoad


def end(loads: list[AttentionLoad], fractions: list[list[float]]) -> None:
    """A step of which every load saw these fractions, by micro-batch."""
    for load, own in zip(loads, fractions, strict=True):
        for fraction in own:
            load.observe(torch.tensor(fraction))
    means = [load.take_step_mean() for load in loads]
    for load, mean in zip(loads, means):
        load.end_step(mean, torch.stack(means).sum())


def total(loads: list[AttentionLoad], attend: list[float]) -> float:
    return sum(load.loss(torch.tensor(p, dtype=torch.float64)).item() for load, p in zip(loads, attend))


def test_the_first_step_has_equal_shares():
    loads = [AttentionLoad(3, 0.5, 0) for _ in range(3)]
    assert total(loads, [0.9, 0.2, 0.4]) == pytest.approx(0.5 * (0.9 + 0.2 + 0.4) / 3, rel=1e-6)


def test_later_steps_weigh_by_the_fractions_of_the_step_before():
    loads = [AttentionLoad(3, 0.5, 0) for _ in range(3)]
    end(loads, [[0.1, 0.3], [0.5, 0.7], [0.0, 0.2]])  # means 0.2, 0.6, 0.1
    assert total(loads, [0.9, 0.2, 0.4]) == pytest.approx(
        0.5 * (0.2 * 0.9 + 0.6 * 0.2 + 0.1 * 0.4) / 0.9, rel=1e-6
    )
    end(loads, [[0.0], [0.0], [1.0]])
    assert total(loads, [0.9, 0.2, 0.4]) == pytest.approx(0.5 * 0.4, rel=1e-6)


def test_no_attention_anywhere_leaves_the_shares_as_they_were():
    loads = [AttentionLoad(2, 1.0, 0) for _ in range(2)]
    end(loads, [[0.0], [0.0]])
    assert [load.share.item() for load in loads] == [0.5, 0.5]
    end(loads, [[0.6], [0.2]])
    end(loads, [[0.0], [0.0]])
    assert [load.share.item() for load in loads] == pytest.approx([0.75, 0.25])
    assert all(load.share.isfinite() and load.steps == 3 for load in loads)


def test_the_weight_rises_over_the_warm_up():
    load, found = AttentionLoad(1, 0.8, 4), []
    for _ in range(6):
        found.append(load.loss(torch.tensor(0.5)).item())
        end([load], [[0.3, 0.3]])  # steps are counted, not micro-batches
    assert found == pytest.approx([0.8 * 0.5 * rise for rise in (0.25, 0.5, 0.75, 1, 1, 1)])


def test_without_warm_up_the_weight_is_whole_from_the_start():
    assert AttentionLoad(1, 0.8, 0).loss(torch.tensor(0.5)).item() == pytest.approx(0.4)


def test_the_gradient_reaches_the_mean_and_not_the_share():
    load = AttentionLoad(2, 0.8, 0)
    fraction = torch.tensor(0.3, requires_grad=True)
    load.observe(fraction)
    load.end_step(load.take_step_mean(), torch.tensor(0.9))
    mean = torch.tensor(0.5, requires_grad=True)
    load.loss(mean).backward()
    assert mean.grad.item() == pytest.approx(0.8 / 3)
    assert fraction.grad is None


def test_a_restored_load_goes_on_where_it_stood():
    load, again = AttentionLoad(2, 0.8, 10), AttentionLoad(2, 0.8, 10)
    load.observe(torch.tensor(0.3))
    load.observe(torch.tensor(0.1))
    load.end_step(load.take_step_mean(), torch.tensor(0.8))
    again.set_state(load.state(), torch.device("cpu"))
    assert (
        again.loss(torch.tensor(0.7)) == load.loss(torch.tensor(0.7)) == pytest.approx(0.8 * 0.2 * 0.25 * 0.7)
    )
    assert again.steps == 1
