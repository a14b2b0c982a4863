"""Dynamic Nested Depth (arXiv 2510.11001): tokens with a high router score pass the same layer a second time."""

import torch
from torch import Tensor

from megadyn.costs.shape import capacity_count
from megadyn.kinds.nested import Nested
from megadyn.model.block import LayerContext, Stream
from megadyn.parallel.mappings import whole_sequence
from megadyn.routing.choice import LinearRouter, gate_statistics, share_statistics
from megadyn.routing.layer import LossScale, RoutedLayer, Step
from megadyn.routing.quantile import GAIN
from megadyn.routing.select import Selection, choose_where, origins, put_back_gated, shared_out, take_out
from megadyn.routing.tracker import RunningThreshold, StepTracker


class FollowingThreshold(RunningThreshold):
    """tau, which follows the (1 - share)-quantile of a step's scores p over the whole global batch.

    Each step moves its logit towards that quantile of the router's logits, in proportion to the excess of the share and to
    the mean distance of logits to tau's, as in `routing/quantile.py`; near the quantile that is about the share `rate` of
    the distance. A step of p itself would not shrink with the scores: where these are close to 0 or 1 it would jump over
    all of them at once.
    """

    def __init__(self, start: float, rate: float, share: float):
        super().__init__(momentum=0.0, average=start)  # without momentum the average is the value itself
        self.start, self.rate, self.share = start, rate, share

    def watch_reached(self, score: Tensor, reached: Tensor) -> None:
        """Observes a training micro-batch: p [B, T], and the mask [B, T] of tokens with p >= tau."""
        distance = logit(score) - logit(self.average.to(score.device))
        self.observe(torch.stack([reached.double().mean(), distance.abs().mean()]))

    def end_step(self, mean: Tensor, total: Tensor | None = None, rate: float = 0.0) -> None:
        reached, spread = mean.unbind()
        move = self.rate * GAIN * spread * (reached - self.share)
        if self.rate:
            self.average = (logit(self.average.to(mean.device)) + move).sigmoid()
        self.steps += 1

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        """Starts anew from a threshold that no score can have, which an earlier form of the rule could leave."""
        average = state["average"] if 0 < state["average"] < 1 else self.start
        super().set_state(state | {"average": average}, device)


def logit(p: Tensor) -> Tensor:
    """In float64, from the least to the largest float32 inside (0, 1): -87 to 17."""
    return torch.logit(p.double().clamp(min=1e-38, max=1 - 2**-25))


class NestedLayer(RoutedLayer):
    """h' = h + Block(h) for every token; p = sigmoid(w h'). Tokens with p >= tau, attending only to each other: h'' =
    h' + p Block(h'), which is (1 - p) h' + p Layer(h'). The others: h'' = h'."""

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        routing = ctx.model.routing
        assert isinstance(routing, Nested)
        self.router = LinearRouter(f"{self.name}.router", ctx)
        self.threshold = FollowingThreshold(routing.threshold_start, routing.threshold_rate, routing.capacity)

    def trackers(self) -> dict[str, StepTracker]:
        return {"thresholds": self.threshold}

    def decision_steps(self, stream: Stream) -> list[Step]:
        post = self.dense(stream.hidden, stream.documents).detach()
        return [
            Step("router", self.router, (post,)),
            Step("choose", lambda x: self.reach(self.score(x)[1]), (post,)),
        ]

    @torch.no_grad()
    def set_share(self, stream: Stream, share: float) -> None:
        """Sets the threshold."""
        score = (
            self.score(self.dense(stream.hidden, stream.documents))[1].flatten().sort(descending=True).values
        )
        count = capacity_count(share, len(score))
        self.threshold.average = score[count - 1 : count + 1].double().mean()

    def score(self, post: Tensor) -> tuple[Tensor, Tensor]:
        """h' [B, T/seq, D] -> p [B, T/seq], and p of the whole sequence [B, T] without gradient."""
        p = self.router(post).sigmoid()
        return p, whole_sequence(p.detach(), self.seq)

    def reach(self, score: Tensor) -> Tensor:
        """Mask [B, T] of the tokens that pass twice."""
        return score >= self.threshold.value.to(score.device)

    def forward(self, stream: Stream) -> Stream:
        post = self.run(self.dense, stream.hidden, stream.documents)
        gate, score = self.score(post)
        reached = self.reach(score)
        mask = self.decisions.settle(reached, score, self.threshold.value)
        self.monitor.record(
            share_statistics(mask)
            | gate_statistics(score, mask)
            | {"threshold": self.threshold.value.to(score)}
        )
        if torch.is_grad_enabled():
            self.threshold.watch_reached(score, reached)
        out = self.run(self.repeat, Stream(post, documents=stream.documents), gate, choose_where(mask))
        return Stream(out, documents=stream.documents)

    def repeat(self, stream: Stream, gate: Tensor, selection: Selection) -> Tensor:
        """h' -> h'' [B, T/seq, D], for gate [B, T/seq]. Under sequence parallelism each rank has its part of the
        tokens, as in the first pass, because the weights are the same."""
        hidden, length = stream.hidden, self.length(stream.hidden)
        if self.seq.size == 1:
            positions, segments = origins(stream, selection, length)
            hidden, taken = take_out(hidden, selection.places)
            return put_back_gated(
                hidden, selection.places, gate, self.delta(taken, positions, length, segments)
            )
        shared = shared_out(selection, self.seq)
        positions, segments = origins(stream, shared.selection, length)
        return shared.put_back(
            hidden, gate, self.delta(shared.take(hidden, self.seq), positions, length, segments), self.seq
        )
