"""Layers whose whole block is skipped by the tokens not chosen."""

from torch import Tensor

from megadyn.model.block import LayerContext, Stream
from megadyn.routing.aux_loss import LossScale
from megadyn.routing.choice import CausalRouter, Choice
from megadyn.routing.layer import RoutedLayer
from megadyn.routing.select import Selection, origins, put_back_shared, take_shared


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
