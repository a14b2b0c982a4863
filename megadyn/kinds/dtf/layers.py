"""DTF, surprise-based routing over pairs of layers (thesis "Dynamic Transformers", eqs. 3.1-3.13).

A Decision layer runs densely and compares its update with a cheap prediction of it. The most surprising tokens of each
sequence go through the Dynamic layer that follows. The score r, and so the gate G, is known at the end of the Decision
layer. So only (hidden, r) is passed between the two, and a pipeline stage may end there.
"""

from torch import Tensor

from megadyn.kinds.dtf import Dtf
from megadyn.kinds.dtf.prior import Prior
from megadyn.model.block import LayerContext, Stream
from megadyn.model.documents import Documents
from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import whole_sequence
from megadyn.routing.choice import gate_statistics
from megadyn.routing.layer import LossScale, RoutedLayer, SkippingLayer, Step
from megadyn.routing.select import Selection
from megadyn.routing.surprise import SurpriseRouter, gate_of, relative_gate


class DecisionLayer(RoutedLayer):
    """Dense for every token; also scores each token's surprise for the following Dynamic layer."""

    chooses = False

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        model, routing = ctx.model, ctx.model.routing
        assert isinstance(routing, Dtf)
        self.prior = Prior(
            f"{self.name}.prior", model.hidden_size, routing.prior_size(model), model.norm_eps, make=ctx.make
        )
        self.router = SurpriseRouter(f"{self.name}.router", ctx, routing)
        self.loss_weight = routing.prior_loss_weight

    def decision_steps(self, stream: Stream) -> list[Step]:
        post = self.dense(stream.hidden, stream.documents).detach()
        return [Step("prior and surprise", self.prior, (stream.hidden, post))]

    def decide(
        self, hidden: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """h [B, T/seq, D] -> post [B, T/seq, D], r [B, T/seq], the prior's loss, statistics."""
        post = self.dense(hidden, documents)
        static, change, prior_loss = self.prior(hidden, post)
        score, statistics = self.router(static, change, documents)
        return post, score, prior_loss, statistics

    def forward(self, stream: Stream) -> Stream:
        """The dense layer's output with r as score. In training, the prior's loss is attached to it."""
        post, score, prior_loss, statistics = self.run(self.decide, stream.hidden, stream.documents)
        self.monitor.record(statistics | {"prior_loss": prior_loss})
        return Stream(self.attach(post, prior_loss, weight=self.loss_weight), score, stream.documents)


class DynamicLayer(SkippingLayer):
    """post + G Block(post) for the most surprising tokens of each sequence; the others pass unchanged. With
    `model.routing.relative_gate`, G over its moving average takes the place of G."""

    takes_score = True

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        routing = ctx.model.routing
        assert isinstance(routing, Dtf)
        self.window = routing.ma_window if routing.relative_gate else None

    def choose(self, stream: Stream) -> Selection:
        assert stream.score is not None
        return self.causal_router(whole_sequence(stream.score.detach(), self.seq), stream.hidden).selection

    def decision_steps(self, stream: Stream) -> list[Step]:
        assert stream.score is not None
        score = whole_sequence(stream.score.detach(), self.seq)
        return [Step("choose", lambda x: self.causal_router(score, x).in_top, (stream.hidden,))]

    def forward(self, stream: Stream) -> Stream:
        assert stream.score is not None, "a Dynamic layer follows its Decision layer"
        score = whole_sequence(stream.score.detach(), self.seq)
        choice = self.causal_router(score, stream.hidden)
        of_all = self.gate(score, stream.documents, Axis("whole"))
        self.monitor.record(choice.statistics | gate_statistics(of_all, choice.in_top))
        return self.process(stream, self.gate(stream.score, stream.documents, self.seq), choice)

    def gate(self, score: Tensor, documents: Documents | None, seq: Axis) -> Tensor:
        """r [B, T/seq] -> what multiplies the block's update, [B, T/seq]."""
        if self.window is None:
            return gate_of(score)
        return relative_gate(score, self.window, seq, documents)
