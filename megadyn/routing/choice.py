"""Chooses the tokens that a routed layer processes: top-k in training, a causal rule when the future is unknown."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.errors import UserError
from megadyn.kinds import Capped, TopK, capacity_count
from megadyn.model.block import LayerContext
from megadyn.parallel.linear import Projection, upcast
from megadyn.parallel.mappings import copy_to_tp, own_part, whole_sequence
from megadyn.parallel.params import constant, normal
from megadyn.routing.quantile import QuantileThreshold, guarded
from megadyn.routing.select import Selection, as_mask, choose_top, choose_where
from megadyn.routing.tracker import RunningThreshold, Statistic, deviation_where, least, mean_where, most

# ---- recording and replacing choices -------------------------------------------------------------


class Choices(NamedTuple):
    """A layer's choices for B sequences, with their scores. Chosen tokens score at or above the cut, others at or below it."""

    chosen: Tensor
    """[B, T], true for chosen tokens; [B, T, n] if n things are chosen per token."""
    score: Tensor
    """float32, same shape as `chosen`."""
    cut: Tensor
    """float32, [B] or [B, n]."""


class Tape:
    """A layer's choices in one step, for this rank's samples in order."""

    def __init__(self, samples: int, given: Tensor | None = None, source: str = "", *, keeps: bool = False):
        """`given`: choices [samples, T] that replace the layer's own, read from `source`. `keeps`: collect the layer's
        own."""
        self.samples, self.given, self.source, self.keeps = samples, given, source, keeps
        self.passed = 0
        """Number of samples settled so far."""
        self.kept: list[Choices] = []

    def settle(self, chosen: Tensor, score: Tensor, cut: Tensor | float | None) -> Tensor:
        first, self.passed = self.passed, self.passed + len(chosen)
        if self.passed > self.samples:  # a fault of the layer, reported at the end of the step
            return chosen
        if self.keeps:
            self.kept.append(
                Choices(chosen, score.detach().float(), cut_of(chosen, score.detach().float(), cut))
            )
        if self.given is None:
            return chosen
        given = self.given[first : self.passed].to(chosen.device)
        if given.shape != chosen.shape:
            raise UserError(
                f"{self.source}: holds choices {list(given.shape[1:])} for each sample, but the layer makes "
                f"{list(chosen.shape[1:])}"
            )
        return given

    def whole(self) -> Choices:
        """The collected choices of all micro-batches."""
        return Choices(*(torch.cat(parts) for parts in zip(*self.kept, strict=True)))


class Decisions:
    """All choices of a layer pass through here, by `settle`, or by `settle_top` for top-k.

    Everything that the layer computes from a choice (gates, losses, statistics, averages over steps) must use the
    result. Both are called outside of recomputation. Without a tape they return their input.
    """

    def __init__(self) -> None:
        self.tape: Tape | None = None
        """The tape of the current training step, if its choices are recorded or replayed."""

    def settle(self, chosen: Tensor, score: Tensor, cut: Tensor | float | None = None) -> Tensor:
        """The final mask, given the layer's own mask `chosen` [B, T] or [B, T, n].

        Args:
            score: the score behind the choice, same shape, equal on all tensor ranks.
            cut: the score needed to be chosen; None for the lowest chosen score.
        """
        return chosen if self.tape is None else self.tape.settle(chosen, score, cut)

    def settle_top(self, top: Selection, score: Tensor) -> Selection:
        """The same for a top-k selection `top` by score [B, T]."""
        if self.tape is None:
            return top
        mask = self.settle(as_mask(top, score.shape), score)
        count = top.places.shape[1]
        if not bool((mask.sum(dim=1) == count).all()):
            raise UserError(
                f"{self.tape.source}: must choose {count} tokens of each sequence, as the layer does"
            )
        return Selection(mask.flatten().nonzero().view(len(mask), count))


def cut_of(chosen: Tensor, score: Tensor, cut: Tensor | float | None) -> Tensor:
    """[B] or [B, n]: `cut`. If a guard changed the choice, it is moved between the lowest chosen and the highest other score."""
    lowest = score.masked_fill(~chosen, torch.inf).amin(dim=1)
    if cut is None:
        return lowest
    highest_left = score.masked_fill(chosen, -torch.inf).amax(dim=1)
    return torch.as_tensor(cut, dtype=score.dtype, device=score.device).maximum(highest_left).minimum(lowest)


# ---- choosing tokens -----------------------------------------------------------------------------


class Choice(NamedTuple):
    """A routed layer's choice for a micro-batch."""

    selection: Selection
    """The tokens that it processes in the current mode."""
    in_top: Tensor
    """[B, T], true for the tokens that training would choose, whatever the mode: by top-k or `model.routing.choose:
    threshold`."""
    loss: Tensor | None
    """The predictor's loss, weighted; None without a predictor."""
    statistics: dict[str, Tensor | Statistic]
    """For `Monitor`: share of routed tokens (mean; minimum and maximum over sequences), agreement of the causal rule
    with top-k."""


class CausalRouter(nn.Module):
    """Chooses tokens by score in either mode. In top-k mode it also trains or tracks the causal rule.

    `threshold`: route iff score >= tau, a running average (`RunningThreshold`).
    `predictor`: route iff sigmoid(P(sg(h))) >= 0.5 with P: D -> D/2 -> 1, SiLU, no biases, trained against the top-k choice.
    `bce`, `sign`: route iff score > 0; the score is trained by binary cross-entropy or not learned at all.
    """

    def __init__(self, name: str, ctx: LayerContext):
        super().__init__()
        routing, d = ctx.model.routing, ctx.model.hidden_size
        assert isinstance(routing, Capped)
        self.capacity, self.rule = routing.share, routing.rule
        self.seq = ctx.make.seq
        self.mode = "topk"
        """`topk` or `causal`."""
        self.decisions = Decisions()
        self.threshold: RunningThreshold | None = None
        if isinstance(routing, TopK) and routing.by_threshold:
            self.threshold = QuantileThreshold(routing.threshold_momentum, routing.share, routing.start)
            self.guards = routing.guards
        elif isinstance(routing, TopK) and routing.uses_threshold:
            self.threshold = RunningThreshold(routing.threshold_momentum)
        if isinstance(routing, TopK) and self.rule == "predictor":
            self.weight = routing.predictor_loss_weight
            init = normal(ctx.model.init_std)
            self.fc1 = Projection(ctx.make(f"{name}.fc1.weight", (d // 2, d), init), seq=self.seq)
            self.fc2 = Projection(ctx.make(f"{name}.fc2.weight", (1, d // 2), init), seq=self.seq)

    def predict(self, hidden: Tensor) -> Tensor:
        """P(sg(h)), [B, T/seq], in float32 or wider."""
        return self.fc2(F.silu(self.fc1(hidden.detach()))).squeeze(-1)

    def forward(self, score: Tensor, hidden: Tensor) -> Choice:
        """score [B, T] must be bitwise equal on all tensor ranks, so that all choose alike; hidden is [B, T/seq, D]."""
        score = score.detach()
        threshold = self.threshold
        if isinstance(threshold, QuantileThreshold) and (threshold.decides or not torch.is_grad_enabled()):
            return self.by_threshold(score, threshold)
        top = self.decisions.settle_top(
            choose_top(score, capacity_count(self.capacity, score.shape[1])), score
        )
        in_top = as_mask(top, score.shape)
        loss: Tensor | None = None
        statistics: dict[str, Tensor | Statistic] = {}
        if self.threshold is not None:
            tau = self.threshold.value.to(score.device)
            causal = score >= tau
            statistics["threshold"] = tau
            if torch.is_grad_enabled():
                self.threshold.watch(score, top)
        elif self.rule == "predictor":
            predicted = self.predict(hidden)
            causal = whole_sequence(predicted.detach(), self.seq) >= 0
            predictor_loss = F.binary_cross_entropy_with_logits(
                predicted, own_part(in_top, self.seq).to(predicted.dtype)
            )
            loss, statistics["predictor_loss"] = self.weight * predictor_loss, predictor_loss.detach()
        else:
            causal = score > 0
        routed = causal if self.mode == "causal" else in_top
        statistics |= share_statistics(routed) | {
            "causal_fraction": causal.float().mean(),
            "causal_agreement": (in_top == causal).float().mean(),
        }
        return Choice(choose_where(causal) if self.mode == "causal" else top, in_top, loss, statistics)

    def by_threshold(self, score: Tensor, threshold: QuantileThreshold) -> Choice:
        """The same rule in training and in use, apart from training's guards (`routing/quantile.py`)."""
        tau = threshold.value.to(score.device)
        causal = chosen = score >= tau
        if torch.is_grad_enabled():
            threshold.watch(score, None)
            chosen = self.decisions.settle(guarded(causal, score, *self.guards), score, tau)
        routed = causal if self.mode == "causal" else chosen
        return Choice(
            choose_where(routed),
            chosen,
            None,
            share_statistics(routed)
            | {
                "threshold": tau,
                "causal_fraction": causal.float().mean(),
                "causal_agreement": (chosen == causal).float().mean(),
            },
        )


class LinearRouter(nn.Module):
    """r = w . h in float32 or wider, [B, T/seq, D] -> [B, T/seq]; not cut over tensor ranks."""

    def __init__(self, name: str, ctx: LayerContext):
        super().__init__()
        self.weight = ctx.make(f"{name}.weight", (1, ctx.model.hidden_size), normal(ctx.model.init_std))
        self.seq = ctx.make.seq

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(upcast(hidden), upcast(copy_to_tp(self.weight, self.seq))).squeeze(-1)


class TwoLayerRouter(nn.Module):
    """W2 f(W1 h + b1) + b2 with inner size `width`, [B, T/seq, D] -> [B, T/seq, outputs], in float32 or wider; not cut
    over tensor ranks."""

    def __init__(
        self,
        name: str,
        ctx: LayerContext,
        width: int,
        outputs: int,
        function: Callable[[Tensor], Tensor] = F.silu,
    ):
        super().__init__()
        make, init, self.function = ctx.make, normal(ctx.model.init_std), function

        def linear(part: str, out_size: int, in_size: int) -> Projection:
            return Projection(
                make(f"{name}.{part}.weight", (out_size, in_size), init),
                make(f"{name}.{part}.bias", (out_size,), constant(0.0)),
                seq=make.seq,
            )

        self.fc1, self.fc2 = linear("fc1", width, ctx.model.hidden_size), linear("fc2", outputs, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.function(self.fc1(hidden)))


def gate_statistics(gate: Tensor, routed: Tensor) -> dict[str, Statistic]:
    """Mean and standard deviation of gate [B, T] over routed and over unrouted tokens (mask [B, T])."""
    found: dict[str, Statistic] = {}
    for name, mask in (("routed", routed), ("unrouted", ~routed)):
        found |= {f"gate_{name}": mean_where(gate, mask), f"gate_{name}_std": deviation_where(gate, mask)}
    return found


def share_statistics(routed: Tensor) -> dict[str, Tensor | Statistic]:
    """Share of tokens routed, from mask [B, T]: its mean, and its minimum and maximum over sequences."""
    share = routed.float().mean(dim=1)
    return {
        "routed_fraction": share.mean(),
        "routed_fraction_min": least(share),
        "routed_fraction_max": most(share),
    }
