"""The control in an exported model: layers that process tokens chosen only by position (see megadyn/kinds/fixed/README.md)."""

from typing import Any, cast

import torch
from torch import Tensor

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, RoutedLayer, Routing, Stream


def hashed(*parts: int | Tensor) -> Tensor:
    """Pseudo-random numbers in [0, 1) determined by `parts`, integers that broadcast, at least one of them a tensor."""
    state: Any = 0  # a tensor from the first tensor on, where that is
    for part in parts:
        state = ((state ^ part) + 0x9E3779B9) & 0xFFFFFFFF
        for _ in range(2):
            state = ((state ^ (state >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        state = state ^ (state >> 16)
    return cast(Tensor, state.double() / 2**32)


class FixedLayer(RoutedLayer):
    """Processes only tokens at positions selected by a hash or by an even spread."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.share, self.seed, self.index = config.routing["capacity"], config.routing["seed"], number - 1
        self.is_random = config.routing["score"] == "random"

    def score(self, place_BC: Tensor) -> Tensor:
        """Positive if the token is processed."""
        if self.is_random:
            return (self.share - hashed(self.seed, self.index, 0, 0, place_BC)).float()
        after_BC = (place_BC + 1).double() * self.share
        chosen_BC = after_BC.floor() > (place_BC.double() * self.share).floor()
        return (chosen_BC.double() - (after_BC - after_BC.floor())).float()

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        score_BC = self.score(context.place_BC)
        return self.route(stream.hidden_BCD, score_BC, torch.ones_like(score_BC), context, cache)


EXPORTED = ExportedKind(
    {"fixed": FixedLayer},
    {"fixed": Router(("capacity", "seed"), {"score": ("random", "stride"), "causal": ("sign",)})},
)
