"""A control: the tokens that a layer processes depend only on their positions."""

from typing import Any

import torch
from torch import Tensor

from megadyn.kinds.fixed import Fixed
from megadyn.model.block import LayerContext, Stream
from megadyn.routing.layer import LossScale, SkippingLayer, Step
from megadyn.routing.select import Selection
from megadyn.routing.tracker import StepCount, StepTracker


def mixed(x: Any) -> Any:
    """Permutes integers in [0, 2^32) so that each bit depends on all others. No product reaches 2^63."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def hashed(*parts: int | Tensor) -> Tensor:
    """Pseudo-random numbers in [0, 1) determined by `parts`, integers that broadcast."""
    state: Any = 0
    for part in parts:
        state = mixed(((state ^ part) + 0x9E3779B9) & 0xFFFFFFFF)
    found: Tensor = state.double() / 2**32
    return found


def random_score(capacity: float, *parts: int | Tensor) -> Tensor:
    """Positive for a share `capacity` of all tokens on average."""
    return (capacity - hashed(*parts)).float()


def stride_score(capacity: float, positions: Tensor) -> Tensor:
    """Positive at exactly floor(capacity T) of the positions 0 .. T - 1, for every T; elsewhere it falls with the
    distance to the last chosen position."""
    after = (positions + 1).double() * capacity  # multiplied as in capacity_count, so that the counts agree
    chosen = after.floor() > (positions.double() * capacity).floor()
    return (chosen.double() - (after - after.floor())).float()


class FixedLayer(SkippingLayer):
    """h_out[i] = h[i] + Block(h)[i] for the top-k of a score that depends only on positions."""

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        routing = ctx.model.routing
        assert isinstance(routing, Fixed)
        self.capacity, self.seed, self.first_sample = routing.share, routing.seed, ctx.first_sample
        self.count = StepCount() if routing.score == "random" else None

    def trackers(self) -> dict[str, StepTracker]:
        return super().trackers() | ({} if self.count is None else {"steps": self.count})

    def score(self, stream: Stream) -> Tensor:
        """[B, T]. In training a random score depends on the step, the sample's position in the global batch and the
        token's position in the sample; otherwise, as in use, on the token's position in its document."""
        batch, device = len(stream.hidden), stream.hidden.device
        places = torch.arange(self.length(stream.hidden), device=device)
        positions = places if stream.documents is None else stream.documents.positions
        if self.count is None:
            return stride_score(self.capacity, positions).expand(batch, -1)
        if not torch.is_grad_enabled():
            return random_score(self.capacity, self.seed, self.index, 0, 0, positions).expand(batch, -1)
        first = self.first_sample + self.count.micro_batches * batch
        samples = torch.arange(first, first + batch, device=device).unsqueeze(1)
        return random_score(self.capacity, self.seed, self.index, self.count.steps + 1, samples, places)

    def choose(self, stream: Stream) -> Selection:
        return self.causal_router(self.score(stream), stream.hidden).selection

    def decision_steps(self, stream: Stream) -> list[Step]:
        return [Step("choose", lambda x: self.causal_router(self.score(stream), x).in_top, (stream.hidden,))]

    def forward(self, stream: Stream) -> Stream:
        choice = self.causal_router(self.score(stream), stream.hidden)
        if self.count is not None and torch.is_grad_enabled():
            self.count.observe(torch.zeros((), device=stream.hidden.device))
        self.monitor.record(choice.statistics)
        gate = torch.ones(stream.hidden.shape[:2], device=stream.hidden.device)
        return self.process(stream, gate, choice)
