"""Mixture-of-Depths (arXiv 2404.02258): a learned score picks the tokens that a layer processes."""

import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.model.block import LayerContext, Stream
from megadyn.parallel.loss import upcast
from megadyn.parallel.params import normal
from megadyn.routing.aux_loss import LossScale
from megadyn.routing.choice import gate_statistics
from megadyn.routing.skipping import SkippingLayer


class LinearRouter(nn.Module):
    """r = w . h in at least float32, [B, T, D] -> [B, T]; whole on every tensor rank."""

    def __init__(self, name: str, ctx: LayerContext):
        super().__init__()
        self.weight = ctx.make(f"{name}.weight", (1, ctx.model.hidden_size), normal(ctx.model.init_std))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(upcast(hidden), upcast(self.weight)).squeeze(-1)


class ModLayer(SkippingLayer):
    """h_out[i] = h[i] + g(r[i]) Block(h)[i] for the top-k of r; the router learns through the gate g and two losses:
    binary cross-entropy of r against the choice, which makes r > 0 a causal rule, and the z-loss mean(r^2)."""

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        routing = ctx.model.routing
        self.router = LinearRouter(f"{self.name}.router", ctx)
        self.sigmoid_gate = routing.gate == "sigmoid"
        self.bce_weight, self.z_weight = routing.bce_loss_weight, routing.z_loss_weight

    def forward(self, stream: Stream) -> Stream:
        hidden = stream.hidden
        logit = self.router(hidden)
        choice = self.causal_router(logit, hidden)
        bce = F.binary_cross_entropy_with_logits(logit, choice.in_top.to(logit.dtype))
        z = logit.square().mean()
        gate = logit.sigmoid() if self.sigmoid_gate else logit
        self.monitor.record(choice.statistics | gate_statistics(gate, choice.in_top) | {
            "bce_loss": bce, "z_loss": z, "logit": logit.mean(), "logit_std": logit.std(correction=0)})
        return self.process(stream, gate, choice, self.bce_weight * bce + self.z_weight * z)
