"""Layers whose whole block is skipped by the tokens not chosen."""

import torch
from torch import Tensor

from megadyn.model.block import Layer, LayerContext, Stream
from megadyn.routing.aux_loss import LossScale, attach_loss
from megadyn.routing.choice import CausalRouter, Choice
from megadyn.routing.monitor import Monitor
from megadyn.routing.select import Selection, origins, put_back_shared, take_shared


class SkippingLayer(Layer):
    """h_out[i] = h[i] + gate[i] * Block(h)[i] for chosen tokens i, attention among them only; h_out[i] = h[i] for the others.

    Under sequence parallelism only the chosen tokens are exchanged, and each rank then runs its heads and widths on them.
    """

    block_is_split = False

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index)
        self.causal_router = CausalRouter(f"{self.name}.causal_router", ctx)
        self.loss_scale = loss_scale
        # Auxiliary losses are means over the layers that have them, and over the parts of the sequence.
        self.share = 1 / ctx.model.layer_types.count(ctx.model.layer_types[index]) / self.seq.size
        self.monitor = Monitor()

    def process(self, stream: Stream, gate: Tensor, choice: Choice, loss: Tensor | None = None) -> Stream:
        """The layer's output for gate [B, T/seq]; `loss` is auxiliary, beside the predictor's."""
        out = self.run(self.update, stream, gate, choice.selection)
        if torch.is_grad_enabled():
            for part in (choice.loss, loss):
                if part is not None:
                    out = attach_loss(out, part, self.share * self.loss_scale.value)
        return Stream(out, documents=stream.documents)

    def update(self, stream: Stream, gate: Tensor, selection: Selection) -> Tensor:
        """h_out [B, T/seq, D]. What `run` recomputes: the selection is fixed by now."""
        hidden, places = stream.hidden, selection.places
        length = self.length(hidden)
        positions, segments = origins(stream, selection, length)
        hidden, taken = take_shared(hidden, places, self.seq)
        delta = self.delta(taken, positions, length, segments)
        return put_back_shared(hidden, places, gate, delta, self.seq)
