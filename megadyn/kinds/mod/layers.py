"""Mixture-of-Depths (arXiv 2404.02258): a learned score picks the tokens that a layer processes."""

import torch.nn.functional as F
from torch import Tensor

from megadyn.kinds.mod import Mod
from megadyn.model.block import LayerContext, Stream
from megadyn.parallel.mappings import own_part, whole_sequence
from megadyn.routing.choice import LinearRouter, gate_statistics
from megadyn.routing.layer import LossScale, SkippingLayer, Step
from megadyn.routing.select import Selection
from megadyn.routing.tracker import deviation_where


class ModLayer(SkippingLayer):
    """h_out[i] = h[i] + g(r[i]) Block(h)[i] for the top-k of r; the router learns through the gate g and two losses:
    binary cross-entropy of r against the choice, which makes r > 0 a causal rule, and the z-loss mean(r^2)."""

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        routing = ctx.model.routing
        assert isinstance(routing, Mod)
        self.router = LinearRouter(f"{self.name}.router", ctx)
        self.sigmoid_gate = routing.gate == "sigmoid"
        self.bce_weight, self.z_weight = routing.bce_loss_weight, routing.z_loss_weight

    def forward(self, stream: Stream) -> Stream:
        hidden = stream.hidden
        logit = self.router(hidden)
        score = whole_sequence(logit.detach(), self.seq)
        choice = self.causal_router(score, hidden)
        bce = F.binary_cross_entropy_with_logits(logit, own_part(choice.in_top, self.seq).to(logit.dtype))
        z = logit.square().mean()
        self.monitor.record(
            choice.statistics
            | gate_statistics(self.gate(score), choice.in_top)
            | {"bce_loss": bce, "z_loss": z, "logit": score.mean(), "logit_std": deviation_where(score)}
        )
        return self.process(stream, self.gate(logit), choice, self.bce_weight * bce + self.z_weight * z)

    def choose(self, stream: Stream) -> Selection:
        return self.causal_router(
            whole_sequence(self.router(stream.hidden).detach(), self.seq), stream.hidden
        ).selection

    def decision_steps(self, stream: Stream) -> list[Step]:
        score = whole_sequence(self.router(stream.hidden).detach(), self.seq)
        return [
            Step("router", self.router, (stream.hidden,)),
            Step("choose", lambda x: self.causal_router(score, x).in_top, (stream.hidden,)),
        ]

    def gate(self, logit: Tensor) -> Tensor:
        """g(r) of any shape, by `model.routing.gate`."""
        return logit.sigmoid() if self.sigmoid_gate else logit
