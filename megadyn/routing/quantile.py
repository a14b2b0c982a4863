"""Training by the threshold (`model.routing.choose: threshold`; arXiv 2603.11535): S = {t : s[t] >= tau} in training and in use.

tau shall follow the (1 - c)-quantile of a step's scores over the whole global batch, so that a share c of all tokens is
chosen (not necessarily of each sequence). Averaging the quantiles of each rank's own tokens over ranks and
micro-batches would depend on how the batch is split. The exact quantile would need all scores in one place, or a
histogram of them. Instead, each step moves tau by the mean over all tokens of two quantities, which does not depend on
the split:

    reached = 1[s >= tau]          spread = |s - tau|
    tau <- tau + (1 - momentum) * 4 * mean(spread) * (mean(reached) - c)

To first order this is a running mean of the steps' quantiles: the quantile is near tau + (mean(reached) - c) / f, where
f is the density of the scores at tau, and 1 / f is about 4 mean(spread) (exactly for uniform scores around their
median; the factor is 3.1 for a normal density at its median, 3.8 at c = 1/8). The density only affects the speed. tau
is stationary only where the share is c, for any distribution, and scales with the scores. It costs an all-reduce of two
numbers per layer and step, together with those that are reduced anyway.

During the first `threshold_start` steps training uses top-k. tau is then the running mean of the lowest chosen score
(`RunningThreshold`), and continues from there.

Guards, in training only: each sequence contributes at least ceil(safe_min T) and at most max(1, floor(safe_max T))
tokens, those with the best scores. While tau is still far off, they bound a step's memory and keep the layer learning.
Evaluation has no guards, in either routing mode, so both losses are those of the model as it is served.
"""

import math

import torch
from torch import Tensor

from megadyn.routing.select import Selection
from megadyn.routing.tracker import RunningThreshold

GAIN = 4.0


class QuantileThreshold(RunningThreshold):
    """tau such that a share `capacity` of all tokens has scores >= tau."""

    def __init__(self, momentum: float, capacity: float, start: int):
        super().__init__(momentum)
        self.capacity, self.start = capacity, start

    @property
    def decides(self) -> bool:
        """Whether training uses the threshold in this step."""
        return self.steps >= self.start

    def watch(self, score: Tensor, top: Selection | None) -> None:
        if self.decides:
            tau = self.value.to(score.device)
            self.observe(torch.stack([(score >= tau).double().mean(), (score - tau).abs().double().mean()]))
        else:
            assert top is not None
            self.observe(
                torch.stack(
                    [self.lowest(score, top), torch.zeros((), dtype=torch.float64, device=score.device)]
                )
            )

    def end_step(self, mean: Tensor, total: Tensor | None = None, rate: float = 0.0) -> None:
        first, spread = mean.unbind()
        if not self.decides:
            super().end_step(first)
            return
        tau = self.value.to(mean) + (1 - self.momentum) * GAIN * spread * (first - self.capacity)
        self.steps += 1
        self.average = tau * (1 - self.momentum**self.steps)  # so that `value` returns tau


def guarded(reached: Tensor, score: Tensor, least: float, most: float) -> Tensor:
    """`reached` [B, T], changed so that each sequence has at least `least` and at most `most` of its tokens, by best
    score [B, T]."""
    length = score.shape[1]
    best_first = score.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(best_first).scatter_(
        1, best_first, torch.arange(length, device=score.device).expand_as(best_first)
    )
    return (reached & (rank < max(1, int(most * length)))) | (rank < math.ceil(least * length))
