"""What every layer with routing has, so that the rest of the house needs to know no kind; and layers whose whole block is skipped
by the tokens not chosen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadyn.model.block import Layer, LayerContext, Stream
from megadyn.routing.choice import CausalRouter, Choice, Decisions
from megadyn.routing.select import Selection, origins, put_back_shared, take_shared
from megadyn.routing.tracker import Monitor, StepTracker


class Step(NamedTuple):
    """A named function of tensors, with its inputs."""

    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]


# ---- auxiliary losses have no path through the pipeline: their gradient is added where they arise -------


class LossScale:
    """What the engine multiplies a micro-batch's loss by before backward: 1 / micro-batches (and fp16's scale)."""

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
    """`activation` unchanged; its backward pass also sends `scale` into the scalar `loss`."""
    return _AttachLoss.apply(activation, loss, scale)


# ---- layers ------------------------------------------------------------------------------------------


class RoutedLayer(Layer):
    """Base of layers that choose tokens, or that score them for the next layer.

    Each choice of a layer passes its `decisions` (`CausalRouter` sees to its own), or it could be neither recorded nor replayed.
    """

    chooses = True
    """Whether it chooses tokens."""

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index)
        self.loss_scale = loss_scale
        self.causal_router: CausalRouter | None = None
        """Chooses tokens by top-k or by a causal rule; None where the layer has one way to choose, or does not choose."""
        self._own_decisions = Decisions()
        self.monitor = Monitor()
        """Statistics, by name; `routed_fraction` is the share of tokens taken."""
        self.like_this: int = ctx.model.layer_types.count(ctx.model.layer_types[index])
        """Layers of this type in the model: an auxiliary loss is the mean over them."""

    @property
    def decisions(self) -> Decisions:
        """What its choices pass: its router's, or its own."""
        return self._own_decisions if self.causal_router is None else self.causal_router.decisions

    def trackers(self) -> dict[str, StepTracker]:
        """What the layer carries from step to step, by name: averaged over ranks as a step ends, and saved in checkpoints."""
        router = self.causal_router
        return {} if router is None or router.threshold is None else {"thresholds": router.threshold}

    def choose(self, stream: Stream) -> Selection | None:
        """The tokens that the layer takes of its input, without running it; None for a layer that takes all."""
        return None

    def decision_steps(self, stream: Stream) -> list[Step]:
        """The steps in which it decides on these tokens, for the benchmark of parts; the first does the operations that the
        kind's `flops` count as `whole`."""
        return []

    def mixing_step(self, stream: Stream, selection: Selection) -> Step | None:
        """What stands in the place of attention, of the normed stream, for the benchmark; None for attention itself."""
        return None

    def set_share(self, stream: Stream, share: float) -> None:
        """Shifts its router so that it takes about `share` of these tokens, for benchmarks of random weights. Does nothing where
        the configuration says how many are taken."""

    def attach(self, hidden: Tensor, *losses: Tensor | None, weight: float = 1.0) -> Tensor:
        """`hidden`, in training with the gradient of auxiliary losses, which are means over the rank's tokens, times `weight`."""
        if torch.is_grad_enabled():
            for loss in losses:
                if loss is not None:
                    hidden = attach_loss(
                        hidden, loss, weight / self.like_this / self.seq.size * self.loss_scale.value
                    )
        return hidden


class GatedLayer(RoutedLayer):
    """h_out[i] = h[i] + gate[i] * Block(h)[i] for chosen tokens i, attention among them only; h_out[i] = h[i] for the others.

    Under sequence parallelism only the chosen tokens are exchanged, and each rank then runs its heads and widths on them.
    """

    block_is_split = False

    def update(self, stream: Stream, gate: Tensor, selection: Selection) -> Tensor:
        """h_out [B, T/seq, D]. What `run` recomputes: the selection is fixed by now."""
        hidden, places = stream.hidden, selection.places
        length = self.length(hidden)
        positions, segments = origins(stream, selection, length)
        hidden, taken = take_shared(hidden, places, self.seq)
        delta = self.delta(taken, positions, length, segments)
        return put_back_shared(hidden, places, gate, delta, self.seq)


class SkippingLayer(GatedLayer):
    """Such a layer with a top-k, and a causal rule that stands in for it."""

    causal_router: CausalRouter

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        self.causal_router = CausalRouter(f"{self.name}.causal_router", ctx)

    def process(self, stream: Stream, gate: Tensor, choice: Choice, loss: Tensor | None = None) -> Stream:
        """The layer's output for gate [B, T/seq]; `loss` is auxiliary, beside the predictor's."""
        out = self.run(self.update, stream, gate, choice.selection)
        return Stream(self.attach(out, choice.loss, loss), documents=stream.documents)
