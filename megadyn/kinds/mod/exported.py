"""Mixture-of-Depths in an exported model: layers that process the tokens selected by a linear score."""

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, RoutedLayer, Routing, Stream, WideLinear


class MixtureOfDepthsLayer(RoutedLayer):
    """Processes only tokens selected by a linear router."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.gate = config.routing["gate"]
        self.router = WideLinear(config.hidden_size, 1, bias=False)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        logit_BT = self.router(stream.hidden_BCD).squeeze(-1)
        gate_BT = logit_BT.sigmoid() if self.gate == "sigmoid" else logit_BT
        return self.route(stream.hidden_BCD, logit_BT, gate_BT, context, cache)


EXPORTED = ExportedKind(
    {"mod": MixtureOfDepthsLayer},
    {
        "linear": Router(
            ("capacity",), {"gate": ("sigmoid", "identity"), "causal": ("threshold", "predictor", "bce")}
        )
    },
)
