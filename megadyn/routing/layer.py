"""The interface of every layer with routing, so that other packages need not know the kinds; and the base of layers
whose whole block is skipped by tokens that are not chosen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadyn.model.block import Layer, LayerContext, Stream
from megadyn.routing.choice import CausalRouter, Choice, Decisions
from megadyn.routing.select import Selection, origins, put_back_shared, take_shared
from megadyn.routing.tracker import Monitor, StepTracker


class Step(NamedTuple):
    """A named function of tensors and its inputs."""

    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]


# ---- the pipeline carries no auxiliary losses: their gradient is added where they are computed ----------


class LossScale:
    """Factor by which the engine multiplies a micro-batch's loss before backward: 1 / micro-batches, times fp16's loss scale."""

    def __init__(self, value: float = 1.0):
        self.value = value


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


def attach_loss(activation: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Returns `activation` unchanged. Its backward pass also sends the gradient `scale` into the scalar `loss`."""
    return _AttachLoss.apply(activation, loss, scale)


# ---- layers ------------------------------------------------------------------------------------------


class RoutedLayer(Layer):
    """Base of layers that choose tokens, or that score them for the next layer.

    Every choice of a layer must pass through its `decisions` (`CausalRouter` does so by itself) to be recorded or replayed.
    """

    chooses = True
    """Whether the layer chooses tokens."""

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index)
        self.loss_scale = loss_scale
        self.causal_router: CausalRouter | None = None
        """Chooses tokens by top-k or a causal rule; None if the layer has only one way to choose, or does not choose."""
        self._own_decisions = Decisions()
        self.monitor = Monitor()
        """Statistics by name; `routed_fraction` is the share of tokens taken."""
        self.like_this: int = ctx.model.layer_types.count(ctx.model.layer_types[index])
        """Number of layers of this type in the model; an auxiliary loss is averaged over them."""

    @property
    def decisions(self) -> Decisions:
        """Where its choices are settled: in its router, or its own."""
        return self._own_decisions if self.causal_router is None else self.causal_router.decisions

    def trackers(self) -> dict[str, StepTracker]:
        """State carried from step to step, by name: averaged over ranks at the end of a step, and saved in checkpoints."""
        router = self.causal_router
        return {} if router is None or router.threshold is None else {"thresholds": router.threshold}

    def choose(self, stream: Stream) -> Selection | None:
        """The tokens that the layer takes from its input, without running it; None for a layer that takes all."""
        return None

    def decision_steps(self, stream: Stream) -> list[Step]:
        """The steps of choosing these tokens, for the benchmark of parts. The first one does the operations that the
        kind's `flops` count as `whole`."""
        return []

    def mixing_step(self, stream: Stream, selection: Selection) -> Step | None:
        """What replaces attention, as a step on the normed stream, for the benchmark; None if nothing does."""
        return None

    def set_share(self, stream: Stream, share: float) -> None:
        """Shifts its router so that it takes about `share` of these tokens, for benchmarks with random weights. Does
        nothing if the configuration determines the number of tokens."""

    def attach(self, hidden: Tensor, *losses: Tensor | None, weight: float = 1.0) -> Tensor:
        """`hidden`; in training it also carries the gradient of auxiliary losses (means over this rank's tokens) times
        `weight`."""
        if torch.is_grad_enabled():
            for loss in losses:
                if loss is not None:
                    hidden = attach_loss(
                        hidden, loss, weight / self.like_this / self.seq.size * self.loss_scale.value
                    )
        return hidden


class GatedLayer(RoutedLayer):
    """h_out[i] = h[i] + gate[i] * Block(h)[i] for chosen tokens i, which attend only to each other; h_out[i] = h[i] for others.

    Under sequence parallelism, only chosen tokens are exchanged. Each rank then runs its part of the heads and widths on them.
    """

    block_is_split = False

    def update(self, stream: Stream, gate: Tensor, selection: Selection) -> Tensor:
        """h_out [B, T/seq, D]. `run` may recompute this: the selection is already fixed."""
        hidden, places = stream.hidden, selection.places
        length = self.length(hidden)
        positions, segments = origins(stream, selection, length)
        hidden, taken = take_shared(hidden, places, self.seq)
        delta = self.delta(taken, positions, length, segments)
        return put_back_shared(hidden, places, gate, delta, self.seq)


class SkippingLayer(GatedLayer):
    """A gated layer with top-k and a causal rule that replaces top-k in generation."""

    causal_router: CausalRouter

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        self.causal_router = CausalRouter(f"{self.name}.causal_router", ctx)

    def process(self, stream: Stream, gate: Tensor, choice: Choice, loss: Tensor | None = None) -> Stream:
        """The layer's output for gate [B, T/seq]. `loss`: an auxiliary loss in addition to the predictor's."""
        out = self.run(self.update, stream, gate, choice.selection)
        return Stream(self.attach(out, choice.loss, loss), documents=stream.documents)
