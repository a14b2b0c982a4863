"""The running threshold: a bias-corrected average over steps, whatever their micro-batches."""

import pytest
import torch

from megadyn.routing.tracker import RunningThreshold


def after_steps(momentum: float, scores: torch.Tensor, micro_batch: int) -> RunningThreshold:
    """scores [steps, samples]: each sample's k-th highest, of which a micro-batch shows its mean."""
    threshold = RunningThreshold(momentum)
    for step in scores:
        for part in step.split(micro_batch):
            threshold.observe(part.mean())
        threshold.end_step(threshold.take_step_mean())
    return threshold


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_the_value_is_the_weighted_mean_of_the_steps(momentum):
    scores = torch.rand(7, 4, generator=torch.Generator().manual_seed(0))
    weights = [momentum ** (6 - step) for step in range(7)]
    want = sum(w * m for w, m in zip(weights, scores.mean(dim=1).tolist())) / sum(weights)
    assert after_steps(momentum, scores, 4).value.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_steps_that_are_all_alike_show_no_bias_towards_the_start(steps):
    assert after_steps(0.99, torch.full((steps, 4), 0.75), 4).value.item() == pytest.approx(0.75, rel=1e-4)


@pytest.mark.parametrize("micro_batches", [1, 3, 7])
def test_a_score_that_stands_still_reaches_its_threshold_forever(micro_batches):
    score, threshold = torch.tensor(0.1), RunningThreshold(0.99)
    for _ in range(3000):
        for _ in range(micro_batches):
            threshold.observe(score)
        threshold.end_step(threshold.take_step_mean())
        assert threshold.value == score


def test_before_the_first_step_the_value_is_zero():
    assert RunningThreshold(0.99).value == 0


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_value_does_not_depend_on_the_split_into_micro_batches(micro_batch):
    scores = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    whole, split = after_steps(0.9, scores, 4), after_steps(0.9, scores, micro_batch)
    torch.testing.assert_close(split.value, whole.value)
    assert split.steps == whole.steps == 5


def test_a_steps_observations_are_forgotten_when_taken():
    threshold = RunningThreshold(0.5)
    threshold.observe(torch.tensor(1.0))
    threshold.observe(torch.tensor(3.0))
    assert threshold.take_step_mean() == 2
    with pytest.raises(AssertionError, match="without a forward pass"):
        threshold.take_step_mean()
    threshold.observe(torch.tensor(10.0))
    assert threshold.take_step_mean() == 10


def test_half_precision_scores_are_averaged_in_float64_and_without_gradient():
    threshold = RunningThreshold(0.99)
    for value in (1.0, 2**-10):  # their sum has more digits than bf16
        threshold.observe(torch.tensor(value, dtype=torch.bfloat16, requires_grad=True))
    mean = threshold.take_step_mean()
    assert mean == (1 + 2**-10) / 2
    assert mean.dtype == torch.float64
    assert not mean.requires_grad
    threshold.end_step(mean)
    assert threshold.value.dtype == torch.float32


def test_a_restored_threshold_goes_on_where_it_stood():
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    straight, first = after_steps(0.9, scores, 4), after_steps(0.9, scores[:3], 4)
    second = RunningThreshold(0.9, float(first.average), first.steps)
    for step in scores[3:]:
        second.end_step(step.mean())
    assert torch.equal(second.value, straight.value)


def test_a_threshold_reads_back_from_its_state():
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    straight, again = after_steps(0.9, scores, 2), RunningThreshold(0.9)
    again.set_state(straight.state(), torch.device("cpu"))
    assert torch.equal(again.value, straight.value)
    assert again.steps == 3
