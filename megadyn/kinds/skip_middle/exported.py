"""Skipping the middle layers in an exported model: a token that leaves at a layer comes back at that layer's mirror image."""

import torch
from torch import Tensor

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, DenseLayer, RoutedLayer, Routing, Stream, WideLinear


class MirroredLayer(RoutedLayer):
    """Processes only tokens whose gate is open. `Stream.score_BC` [B, C, layers] holds m of the layers of the first half."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        DenseLayer.__init__(self, config, number)  # needs no causal router: the gate itself is causal

    def choose(self, score_BT: Tensor, h_BTD: Tensor, context: Context) -> Tensor:
        return (score_BT > 0) & context.tokens.valid_BC

    def gated(
        self, stream: Stream, m_BC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Routing]:
        gate_BC = 1 - m_BC.clamp(max=1)
        out, routing = self.route(stream.hidden_BCD, gate_BC, gate_BC, context, cache)
        return out.hidden_BCD, routing


class LeavingLayer(MirroredLayer):
    """A layer of the first half."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.router = WideLinear(config.hidden_size, 1)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        m_BCL = self.router(stream.hidden_BCD).relu()
        if stream.score_BC is not None:
            m_BCL = torch.cat((stream.score_BC, stream.score_BC[..., -1:] + m_BCL), dim=-1)
        h_BCD, routing = self.gated(stream, m_BCL[..., -1], context, cache)
        return Stream(h_BCD, m_BCL), routing


class ReturningLayer(MirroredLayer):
    """A layer of the second half, which uses the gate of its mirror image."""

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        assert stream.score_BC is not None
        h_BCD, routing = self.gated(stream, stream.score_BC[..., -1], context, cache)
        return Stream(h_BCD, stream.score_BC[..., :-1]), routing


def check_types(layer_types: list[str]) -> None:
    half = len(layer_types) // 2
    if layer_types != ["skip_middle_out"] * half + ["skip_middle_back"] * half:
        raise ValueError(
            f"routed_layer_types = {layer_types!r}: must be half skip_middle_out, then half skip_middle_back"
        )


EXPORTED = ExportedKind(
    {"skip_middle_out": LeavingLayer, "skip_middle_back": ReturningLayer},
    {"accumulated": Router()},
    check_types,
)
