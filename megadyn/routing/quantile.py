"""Training by the threshold (`model.routing.choose: threshold`; arXiv 2603.11535): S = {t : s[t] >= tau} in training and in use.

tau is to follow the (1 - c)-quantile of a step's scores over the whole global batch, so that a share c of all tokens is taken,
though not of every sequence. The quantile of a rank's own tokens, averaged over ranks and micro-batches, is another number,
which depends on how the batch is split; the exact one would take all scores to one place, or a histogram of them. Instead each
step moves tau by what is the same however the batch is split, the mean over all tokens of two numbers:

    reached = 1[s >= tau]          spread = |s - tau|
    tau <- tau + (1 - momentum) * 4 * mean(spread) * (mean(reached) - c)

This is a running mean of the step's quantile, to first order: that quantile lies near tau + (mean(reached) - c) / f, f being the
density of the scores at tau, and 1 / f is about 4 mean(spread) (exactly that for uniform scores around their median; 3.1 for a
normal density at its median, 3.8 at c = 1/8). The density sets the pace alone. tau rests only where the share is c, whatever the
distribution, and is invariant to the scale of the scores. It costs an all-reduce of two numbers per layer and step, beside those
that are reduced anyway.

During the first `threshold_start` steps training takes the top-k, and tau is the running mean of the lowest score that top-k took
(`RunningThreshold`), from which it then goes on.

Guards, in training alone: of each sequence at least ceil(safe_min T) and at most max(1, floor(safe_max T)) tokens, by its best
scores. They bound a step's memory, and keep a layer learning, while tau is still far off. Evaluation has none, in either routing
mode, so that both losses are the one that is served.
"""

import math

import torch
from torch import Tensor

from megadyn.routing.select import Selection
from megadyn.routing.tracker import RunningThreshold

GAIN = 4.0


class QuantileThreshold(RunningThreshold):
    """tau such that a share `capacity` of all tokens reaches it."""

    def __init__(self, momentum: float, capacity: float, start: int):
        super().__init__(momentum)
        self.capacity, self.start = capacity, start

    @property
    def decides(self) -> bool:
        """Whether training goes by it, in this step."""
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
        self.average = tau * (1 - self.momentum**self.steps)  # what `value` makes tau of


def guarded(reached: Tensor, score: Tensor, least: float, most: float) -> Tensor:
    """The mask `reached` [B, T] with at least the share `least` and at most `most` of each sequence, its best by score [B, T]."""
    length = score.shape[1]
    best_first = score.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(best_first).scatter_(
        1, best_first, torch.arange(length, device=score.device).expand_as(best_first)
    )
    return (reached & (rank < max(1, int(most * length)))) | (rank < math.ceil(least * length))
