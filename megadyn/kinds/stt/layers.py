"""Subjective Timescale Transformer (arXiv 2511.21408): surprise over time decides which updates of a layer are applied."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.kinds.stt import Stt
from megadyn.model.block import LayerContext, Stream
from megadyn.model.documents import Documents
from megadyn.parallel.grid import Axis
from megadyn.parallel.linear import upcast
from megadyn.parallel.mappings import copy_to_tp, own_part, whole_sequence
from megadyn.parallel.params import ParamMaker, constant, normal
from megadyn.routing.choice import CausalRouter, gate_statistics, share_statistics
from megadyn.routing.layer import LossScale, RoutedLayer, Step
from megadyn.routing.select import Selection, choose_where, origins, put_back_shared, take, take_shared
from megadyn.routing.surprise import SurpriseRouter, gate_of


class TransitionNetwork(nn.Module):
    """Predicts a token's update from the previous token: a narrow SwiGLU of its norm, without biases; not cut over
    tensor ranks. It holds all four weights itself, because ZeRO-3 gathers only the weights of the running module."""

    def __init__(self, name: str, hidden_size: int, width: int, eps: float, *, make: ParamMaker):
        super().__init__()
        self.eps, init = eps, normal(0.02)
        self.norm = make(f"{name}.norm.weight", (hidden_size,), constant(1.0))
        self.gate_proj = make(f"{name}.gate_proj.weight", (width, hidden_size), init)
        self.up_proj = make(f"{name}.up_proj.weight", (width, hidden_size), init)
        self.down_proj = make(f"{name}.down_proj.weight", (hidden_size, width), init)

    def forward(self, before: Tensor, update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output for the previous token, without gradient, and its update of this token, [B, T, D] -> D_st
        and D_ch [B, T] and the loss (the mean of D_ch; its gradient reaches only these weights); in float32 or wider."""
        x = F.rms_norm(before, self.norm.shape, self.norm, self.eps)
        predicted = (F.silu(x @ self.gate_proj.T) * (x @ self.up_proj.T)) @ self.down_proj.T
        update = upcast(update)
        static, change = update.square().mean(dim=-1), (update - predicted).square().mean(dim=-1)
        return static, change, (update.detach() - predicted).square().mean()


class SubjectiveLayer(RoutedLayer):
    """Training: h_out[i] = h[i] + G[i] Block(h)[i] for the top-k by surprise G of Block(h), which is computed for every
    token. Use: the same for the tokens that the predictor takes; the layer sees only those.

    Under sequence parallelism each rank compares all tokens, so the results are equal on all ranks.
    """

    block_is_split = False
    causal_router: CausalRouter

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        model, routing = ctx.model, ctx.model.routing
        assert isinstance(routing, Stt)
        whole = replace(ctx, make=replace(ctx.make, seq=Axis("seq")))
        self.prior = TransitionNetwork(
            f"{self.name}.prior",
            model.hidden_size,
            routing.prior_size(model),
            model.norm_eps,
            make=whole.make,
        )
        self.router = SurpriseRouter(f"{self.name}.router", whole, routing)
        self.causal_router = CausalRouter(f"{self.name}.causal_router", ctx)
        self.loss_weight = routing.prior_loss_weight

    def forward(self, stream: Stream) -> Stream:
        if self.causal_router.mode == "causal":
            return self.causally(stream)
        delta, score, loss, statistics = self.run(self.surprise, stream, None)
        choice = self.causal_router(score, stream.hidden)
        gate, places = gate_of(score), choice.selection.places
        self.monitor.record(
            choice.statistics | gate_statistics(gate, choice.in_top) | statistics | {"prior_loss": loss}
        )
        hidden = self.updated(stream.hidden, places, gate, take(delta, places))
        hidden = self.attach(hidden, choice.loss)
        # Every part of the sequence holds the whole loss, and sends its gradient.
        return Stream(
            self.attach(hidden, loss, weight=self.loss_weight * self.seq.size), documents=stream.documents
        )

    def causally(self, stream: Stream) -> Stream:
        """The layer in causal mode: the predictor decides, and the block runs only on its tokens."""
        mask = self.predicted(stream)
        self.monitor.record(share_statistics(mask))
        selection = choose_where(mask)
        if not selection.places.numel():
            return Stream(stream.hidden, documents=stream.documents)
        delta, score, _, _ = self.run(self.surprise, stream, selection)
        gate = (
            score.new_zeros(mask.numel())
            .index_copy(0, selection.places.flatten(), gate_of(score).flatten())
            .view(mask.shape)
        )
        return Stream(self.updated(stream.hidden, selection.places, gate, delta), documents=stream.documents)

    def predicted(self, stream: Stream) -> Tensor:
        """Mask [B, T] of the tokens that the predictor takes."""
        return whole_sequence(self.causal_router.predict(stream.hidden).detach(), self.seq) >= 0

    def updated(self, hidden: Tensor, places: Tensor, gate: Tensor, delta: Tensor) -> Tensor:
        """hidden [B, T/seq, D] with gate [B, T] times delta [b, c, D] added at places [b, c]."""
        return put_back_shared(
            hidden, places, own_part(copy_to_tp(gate, self.seq), self.seq), delta, self.seq
        )

    def surprise(
        self, stream: Stream, selection: Selection | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """For the selected tokens [b, c] (None: all, [B, T]), which see only each other: the update [b, c, D], the
        score r [b, c], the prior's loss, statistics."""
        hidden, length = stream.hidden, self.length(stream.hidden)
        takes_all = selection is None
        if selection is None and self.seq.size == 1:
            segments, positions = stream.documents or (None, None)
        else:
            if selection is None:
                every = torch.arange(len(hidden) * length, device=hidden.device)
                selection = Selection(every.view(len(hidden), length))
            positions, segments = origins(stream, selection, length)
            hidden = take_shared(hidden, selection.places, self.seq)[1]
        delta = self.self_attn(self.input_layernorm(hidden), positions, length, segments, whole=takes_all)
        delta = self.feed_forward(hidden, delta) - hidden
        # The previous token in the same sequence and document; zeros before the first.
        before = F.pad((hidden + delta).detach()[:, :-1], (0, 0, 1, 0))
        documents = None
        if segments is not None:
            since = since_border(segments.ids)
            documents, before = Documents(segments, since), before.masked_fill((since == 0).unsqueeze(-1), 0)
        static, change, loss = self.prior(before, delta)
        score, statistics = self.router(static, change, documents)
        return delta, score, loss, statistics

    def choose(self, stream: Stream) -> Selection:
        if self.causal_router.mode == "causal":
            return choose_where(self.predicted(stream))
        return self.causal_router(self.surprise(stream, None)[1], stream.hidden).selection

    def decision_steps(self, stream: Stream) -> list[Step]:
        delta, score, _, _ = self.surprise(stream, None)
        return [
            Step("prior and surprise", self.prior, (stream.hidden, delta.detach())),
            Step("choose", lambda x: self.causal_router(score, x).in_top, (stream.hidden,)),
        ]


def since_border(ids: Tensor) -> Tensor:
    """How many tokens with the same id come before each token, for ids [b, c] in which equal ids are adjacent within a row."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return place - torch.where(begins, place, 0).cummax(dim=1).values
