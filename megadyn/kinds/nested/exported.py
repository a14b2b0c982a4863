"""Dynamic Nested Depth in an exported model: layers that some tokens pass twice."""

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, DenseLayer, RoutedLayer, Routing, Stream, WideLinear


class NestedLayer(RoutedLayer):
    """Processes every token, and a second time those whose score reaches the threshold. The second pass has its own cache."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.router = WideLinear(config.hidden_size, 1, bias=False)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        post_BCD = DenseLayer.forward(self, stream, context, cache)[0].hidden_BCD
        p_BC = self.router(post_BCD).squeeze(-1).sigmoid()
        return self.route(post_BCD, p_BC, p_BC, context, None if cache is None else cache.second())


EXPORTED = ExportedKind({"nested": NestedLayer}, {"linear": Router((), {"causal": ("threshold",)})})
