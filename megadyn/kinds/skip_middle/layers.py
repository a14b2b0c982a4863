"""Skipping the middle layers (arXiv 2506.21103): a token that leaves at a layer comes back at that layer's mirror image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.costs.shape import capacity_count
from megadyn.kinds.skip_middle import SkipMiddle
from megadyn.model.block import LayerContext, Stream
from megadyn.parallel.linear import upcast
from megadyn.parallel.mappings import copy_to_tp, own_part, whole_sequence
from megadyn.parallel.params import constant, normal
from megadyn.routing.choice import gate_statistics, share_statistics
from megadyn.routing.layer import GatedLayer, LossScale, Step
from megadyn.routing.select import Selection, choose_where
from megadyn.routing.tracker import StepTracker


class LeavingRouter(nn.Module):
    """ReLU(w . h + b) in float32 or wider, [B, T/seq, D] -> [B, T/seq]."""

    def __init__(self, name: str, ctx: LayerContext):
        super().__init__()
        self.weight = ctx.make(f"{name}.weight", (1, ctx.model.hidden_size), normal(ctx.model.init_std))
        self.bias = ctx.make(f"{name}.bias", (1,), constant(0.0))
        self.seq = ctx.make.seq

    def forward(self, hidden: Tensor) -> Tensor:
        weight, bias = (upcast(copy_to_tp(param, self.seq)) for param in (self.weight, self.bias))
        return F.linear(upcast(hidden), weight, bias).squeeze(-1).relu()


class Pressure(StepTracker):
    """Weight of the mean gate in the loss. It rises while the layers process more than `target` of the tokens, and
    falls while they process less. Updated once per step, from the share over the whole global batch and all layers."""

    def __init__(self, layers: int, target: float, rate: float):
        super().__init__()
        self.layers, self.target, self.rate = layers, target, rate
        self.weight = torch.zeros(())
        self.steps = 0

    def end_step(self, mean: Tensor, total: Tensor | None, rate: float = 0.0) -> None:
        assert total is not None, "a name in Kind.totals"
        self.weight = self.weight.to(total.device) + self.rate * (total / self.layers - self.target)
        self.steps += 1

    def state(self) -> dict[str, float]:
        return {"weight": float(self.weight), "steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.weight, self.steps = torch.tensor(state["weight"], device=device), int(state["steps"])


class MirroredLayer(GatedLayer):
    """h + g Block(h), g = 1 - min(m, 1), for tokens with m < 1, which attend only to each other; h for the others."""

    def gated(self, stream: Stream, m: Tensor, **statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m [B, T/seq] -> h_out [B, T/seq, D], g [B, T/seq] and the mask of processed tokens [B, T]."""
        score = whole_sequence(1 - m.detach(), self.seq)
        mask = self.decisions.settle(score > 0, score, 0.0)
        # Uses the mask, not m: at m = 1 the gate is continuous, but its gradient is not.
        gate = (1 - m).masked_fill(~own_part(mask, self.seq), 0)
        self.monitor.record(
            share_statistics(mask) | gate_statistics(score.masked_fill(~mask, 0), mask) | statistics
        )
        return self.run(self.update, stream._replace(score=None), gate, choose_where(mask)), gate, mask


def can_return(gate: Tensor, m: Tensor, pressure: Tensor) -> Tensor:
    """The gate [B, T/seq]. If the pressure is negative, it has the gradient of 1 - m also for tokens that have left (m
    >= 1), where the gate itself is flat. Otherwise a layer that all tokens have left would stay empty whatever the pressure."""
    lost = torch.where((pressure < 0) & (m >= 1), -m, torch.zeros_like(m))
    return gate + lost - lost.detach()


class LeavingLayer(MirroredLayer):
    """A layer of the first half: m_l = m_(l-1) + ReLU(w_l . h + b_l), m_0 = 0. `Stream.score` holds m of this half's
    layers, [B, T/seq, layers]."""

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        routing = ctx.model.routing
        assert isinstance(routing, SkipMiddle)
        self.router = LeavingRouter(f"{self.name}.router", ctx)
        self.pressure = Pressure(self.like_this, routing.capacity, routing.pressure_rate)

    def trackers(self) -> dict[str, StepTracker]:
        return {"pressure": self.pressure}

    def accumulate(self, stream: Stream) -> Tensor:
        """m [B, T/seq]."""
        step = self.router(stream.hidden)
        return step if stream.score is None else stream.score[..., -1] + step

    def choose(self, stream: Stream) -> Selection:
        return choose_where(whole_sequence(self.accumulate(stream).detach(), self.seq) < 1)

    def decision_steps(self, stream: Stream) -> list[Step]:
        m = whole_sequence(self.accumulate(stream).detach(), self.seq)
        return [
            Step("router", self.router, (stream.hidden,)),
            Step("choose", lambda x: m < 1, (stream.hidden,)),
        ]

    @torch.no_grad()
    def set_share(self, stream: Stream, share: float) -> None:
        """Sets the bias, considering only tokens that have not left earlier."""
        m = self.accumulate(stream).flatten().sort().values
        count = capacity_count(share, len(m))
        self.router.bias.add_(1 - m[count - 1 : count + 1].mean())

    def forward(self, stream: Stream) -> Stream:
        m = self.accumulate(stream)
        pressure = self.pressure.weight.to(m)
        out, gate, mask = self.gated(stream, m, pressure=pressure)
        if torch.is_grad_enabled():
            out = self.attach(out, pressure * can_return(gate, m, pressure).mean())
            self.pressure.observe(mask.float().mean())
        m = m.unsqueeze(-1)
        return Stream(
            out, m if stream.score is None else torch.cat([stream.score, m], dim=-1), stream.documents
        )


class ReturningLayer(MirroredLayer):
    """A layer of the second half: m is that of its mirror image, the last layer in `Stream.score` not yet used by a
    mirror image."""

    def choose(self, stream: Stream) -> Selection:
        assert stream.score is not None
        return choose_where(whole_sequence(stream.score[..., -1].detach().contiguous(), self.seq) < 1)

    def forward(self, stream: Stream) -> Stream:
        assert stream.score is not None, "a layer of the second half follows those of the first"
        out, _, _ = self.gated(stream, stream.score[..., -1])
        return Stream(out, stream.score[..., :-1], stream.documents)
