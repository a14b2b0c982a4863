"""DTRNet (arXiv 2509.00925): each token takes attention or a linear bypass; every token keeps its MLP."""

import math

import torch
from torch import Tensor

from megadyn.costs.shape import capacity_count
from megadyn.kinds.dtrnet import Dtrnet
from megadyn.kinds.dtrnet.load import AttentionLoad
from megadyn.kinds.dtrnet.share import ShareController, excess
from megadyn.model.block import LayerContext, Stream
from megadyn.model.recompute import recomputed
from megadyn.parallel.mappings import enter_tp, own_part, whole_sequence
from megadyn.routing.choice import CausalRouter, TwoLayerRouter, gate_statistics, share_statistics
from megadyn.routing.layer import LossScale, RoutedLayer, Step, attach_loss
from megadyn.routing.select import (
    Selection,
    as_mask,
    choose_top,
    choose_where,
    origins,
    repeat_or_replace,
    scaled,
    take_out,
)
from megadyn.routing.tracker import Statistic, StepTracker, deviation_where


class DtrLayer(RoutedLayer):
    """p = softmax(router(h)). Attending tokens: a = p0 O(attention among them). The others: a = p1 O(V(x)), only their
    own value. u = h + a; h_out = u + MLP(Norm(u)) for every token.

    Tokens are ranked by the logit difference (`lead`), and p0 > 0.5 is lead > 0. The order is that of p0, but p0 rounds
    to 0 or 1 in float32, where tokens tie.
    """

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        routing = ctx.model.routing
        assert isinstance(routing, Dtrnet)
        self.router = TwoLayerRouter(f"{self.name}.router", ctx, ctx.model.hidden_size // 2, 2)
        # Token choice is causal by itself; expert choice uses top-k and needs a causal rule.
        self.causal_router = None if routing.token_choice else CausalRouter(f"{self.name}.causal_router", ctx)
        self.least = routing.safe_min_attn_ratio
        self.jitter, self.entropy_bonus = routing.jitter, routing.entropy_bonus
        controller = None
        if routing.target_share is not None:
            controller = ShareController(
                routing.target_share, routing.aux_loss_lambda, routing.aux_loss_lambda_limit
            )
        self.load = AttentionLoad(
            self.like_this, routing.aux_loss_lambda, routing.aux_loss_warmup, controller
        )
        self.seed_for, self.first_sample = ctx.make.seed_for, ctx.first_sample

    def trackers(self) -> dict[str, StepTracker]:
        return super().trackers() | {"loads": self.load}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of (attend, bypass), [B, T/seq, 2], with jitter in training."""
        logits = self.router(hidden)
        if self.jitter and torch.is_grad_enabled():
            logits = logits * (1 + self.jitter * (2 * self.noise(logits) - 1))
        return logits

    def probabilities(self, hidden: Tensor) -> Tensor:
        """p [B, T/seq, 2], with jitter in training."""
        return self.logits(hidden).softmax(dim=-1)

    def noise(self, logits: Tensor) -> Tensor:
        """Uniform in [0, 1), shaped as logits [B, T/seq, 2]. It depends only on the step and the sample's position in
        the global batch, so it is the same on every tensor rank and under every layout."""
        noise = logits.new_empty(logits.shape[0], self.length(logits), 2)
        generator = torch.Generator(logits.device)
        first = self.first_sample + self.load.micro_batches * len(logits)
        for sample, row in enumerate(noise, start=first):
            generator.manual_seed(self.seed_for(f"{self.name}.jitter/{self.load.steps}/{sample}"))
            row.uniform_(generator=generator)
        return own_part(noise, self.seq)

    def choice(self, lead: Tensor, hidden: Tensor) -> tuple[Selection, Tensor, dict[str, Tensor | Statistic]]:
        """Logit differences [B, T] -> the attending tokens, as a selection and as a mask [B, T]; and statistics."""
        if self.causal_router is not None:
            choice = self.causal_router(lead, hidden)
            return choice.selection, as_mask(choice.selection, lead.shape), choice.statistics
        mask = lead > 0
        statistics: dict[str, Tensor | Statistic] = {}
        if self.least and torch.is_grad_enabled():
            least = math.ceil(self.least * lead.shape[1])
            short = mask.sum(dim=1, keepdim=True) < least
            # A superset of the mask, because the tokens with the best leads include all those above 0.
            mask = mask | (short & as_mask(choose_top(lead.detach(), least), lead.shape))
            statistics["refills"] = short.float().mean()
        mask = self.decisions.settle(mask, lead, 0.0)
        return choose_where(mask), mask, statistics | share_statistics(mask)

    def lead(self, hidden: Tensor) -> Tensor:
        """The logit differences [B, T] of the whole sequence, by which the layer chooses."""
        logits = self.logits(hidden).detach()
        return whole_sequence(logits[..., 0] - logits[..., 1], self.seq)

    def choose(self, stream: Stream) -> Selection:
        return self.choice(self.lead(stream.hidden), stream.hidden)[0]

    def decision_steps(self, stream: Stream) -> list[Step]:
        lead = self.lead(stream.hidden)
        return [
            Step("router", self.logits, (stream.hidden,)),
            Step("choose", lambda x: self.choice(lead, x)[1], (stream.hidden,)),
        ]

    def mixing_step(self, stream: Stream, selection: Selection) -> Step:
        return Step("attention or bypass", lambda normed: self.mix(stream, normed, selection), ())

    @torch.no_grad()
    def set_share(self, stream: Stream, share: float) -> None:
        """Sets the bias in the widest gap between scores within a hundredth of the tokens, so that rounding changes no
        choice."""
        if self.causal_router is not None:
            return
        logits = self.router(stream.hidden)
        lead = (logits[..., 0] - logits[..., 1]).flatten().sort(descending=True).values
        count = capacity_count(share, len(lead))
        near = lead[count - count // 100 - 1 : count + count // 100 + 1]
        widest = int((near[:-1] - near[1:]).argmax())
        assert self.router.fc2.bias is not None
        self.router.fc2.bias[1] += near[widest : widest + 2].mean().to(self.router.fc2.bias.dtype)

    def attend_or_pass(self, stream: Stream, p: Tensor, selection: Selection, mask: Tensor) -> Tensor:
        """h_out [B, T/seq, D], for p [B, T/seq, 2] and the attending tokens, as a selection and as a mask [B, T]."""
        mixed = self.mix(stream, self.input_layernorm(stream.hidden), selection)
        weight = torch.where(own_part(mask, self.seq), p[..., 0], p[..., 1])
        return self.feed_forward(stream.hidden, scaled(mixed, weight))

    def mix(self, stream: Stream, normed: Tensor, selection: Selection) -> Tensor:
        """O(attention) for attending tokens, O(V) for the others, [B, T/seq, D]; `normed` is the norm of the stream."""
        attention = self.self_attn
        places, length = selection.places, self.length(normed)
        positions, segments = origins(stream, selection, length)
        x = enter_tp(normed, attention.tp, attention.seq)
        x, attending = take_out(x, places)
        q, k = attention.queries_keys(attending)  # of attending tokens only
        v, chosen_v = take_out(attention.values(x), places)  # [B, T, G/tp, K] and [b, c, G/tp, K]
        inputs = (q, k, chosen_v, positions, length, segments)
        attended = recomputed(attention.attend, *inputs) if attention.recompute else attention.attend(*inputs)
        return attention.o_proj(repeat_or_replace(v, places, attended))  # of [B, T, H/tp * K]

    def statistics(self, lead: Tensor, mask: Tensor) -> dict[str, Tensor | Statistic]:
        """For `Monitor`, from logit differences [B, T] and the mask of attending tokens [B, T]; the loss is unweighted."""
        attend = lead.sigmoid()
        mean = attend.mean()
        found: dict[str, Tensor | Statistic] = {
            "p0": mean,
            "f": mask.float().mean(),
            "lead": lead.mean(),
            "lead_std": deviation_where(lead),
            "lambda": self.load.value.to(mean),
            "attention_loss": self.load.part.to(mean) * self.load.pushed(lead),
        }
        return gate_statistics(attend, mask) | found

    def forward(self, stream: Stream) -> Stream:
        hidden = stream.hidden
        logits = self.logits(hidden)
        p, own_lead = logits.softmax(dim=-1), logits[..., 0] - logits[..., 1]
        lead = whole_sequence(own_lead.detach(), self.seq)
        selection, mask, statistics = self.choice(lead, hidden)
        self.monitor.record(statistics | self.statistics(lead, mask))
        out = self.run(self.attend_or_pass, stream, p, selection, mask)
        if torch.is_grad_enabled():
            fraction = mask.float().mean()
            loss = self.load.loss(self.load.pushed(own_lead))
            if self.load.controller is not None:
                loss = loss + excess(own_lead) / self.load.layers
            if self.entropy_bonus:
                entropy = -(p * p.clamp(min=1e-9).log()).sum(dim=-1).mean()
                loss = loss - self.entropy_bonus * entropy / self.load.layers
            self.load.observe(fraction)
            out = attach_loss(out, loss, self.loss_scale.value / self.seq.size)
        return Stream(out, documents=stream.documents)
