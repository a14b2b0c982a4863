"""Cuts the layer list into DeepSpeed pipeline stages."""

from collections.abc import Callable
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from megadyn.model.block import Layer, Stream
from megadyn.model.documents import from_ids
from megadyn.network import LayerMaker, read_out
from megadyn.parallel.grid import Axis, Grid
from megadyn.parallel.mappings import own_part, whole_sequence
from megadyn.parallel.wire import pack, unpack


class Stages(PipelineModule):
    """This rank's part of the list. One tensor crosses each stage boundary."""

    def __init__(
        self,
        parts: list[LayerMaker],
        layer_boundaries: list[int],
        grid: Grid,
        *,
        seq: Axis,
        tied: bool,
        by_document: bool,
        gate: Callable[[Tensor], Tensor],
    ):
        """`layer_boundaries`: cuts between transformer layers, from `balanced_stages`.

        Each training loss goes through `gate` before the backward pass.
        """
        self.boundaries = part_boundaries(layer_boundaries, len(parts))
        self.rank_grid, self.seq, self.by_document, self.gate = grid, seq, by_document, gate
        topology = PipeModelDataParallelTopology(
            num_pp=grid.pp.size, num_mp=grid.tp.size, num_dp=grid.dp.size
        )
        super().__init__(_specs(parts, tied), topology=topology, loss_fn=self.loss)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.boundaries
        self._set_bounds(self.parts[self.rank_grid.pp.rank], self.parts[self.rank_grid.pp.rank + 1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Takes tokens or the previous stage's tensor; returns the input of the next stage or of `loss`."""
        layers = self.forward_funcs[:-1] if self.rank_grid.is_last_stage else self.forward_funcs
        stream: Any = inputs
        if not self.rank_grid.is_first_stage:
            takes_score = isinstance(layers[0], Layer) and layers[0].takes_score
            hidden, score, ids = unpack(inputs, gate=takes_score, ids=self.by_document)
            stream = Stream(hidden, score, None if ids is None else from_ids(whole_sequence(ids, self.seq)))
        for layer in layers:
            stream = layer(stream)
        if self.rank_grid.is_last_stage:
            return stream.hidden
        ids = None if stream.documents is None else own_part(stream.documents.segments.ids, self.seq)
        return pack(stream.hidden, stream.score, ids)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Head and loss. The head needs the labels, which the engine passes only to the loss function."""
        return self.gate(self.forward_funcs[-1](Stream(hidden), labels))


def part_boundaries(layer_boundaries: list[int], parts: int) -> list[int]:
    """Cuts in the whole list, which has Embed before the first layer, and FinalNorm and Head after the last."""
    return [0, *(cut + 1 for cut in layer_boundaries[1:-1]), parts]


def _specs(parts: list[LayerMaker], tied: bool) -> list[LayerSpec]:
    if not tied:
        return [LayerSpec(part.build, *part.arguments) for part in parts]
    embed, *body, _ = parts
    return [
        TiedLayerSpec("embed", embed.build, *embed.arguments),
        *(LayerSpec(part.build, *part.arguments) for part in body),
        TiedLayerSpec("embed", embed.build, *embed.arguments, forward_fn=read_out),
    ]
