"""Kinds whose routed layers can be anywhere in the model, and the patterns that place them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import DENSE, Kind


@dataclass
class Laid(Kind):
    """Base of kinds whose routed layers can be anywhere: `layout` places them. A mixin, listed before the other base."""

    layout: str | None = None
    """Which layers are routed: `bilayer` (every second; the default), `zero_attn` (all), `four_attn` (all except 1, 2,
    L/2, L/2 + 1), or a pattern of T (dense) and D (routed) such as `TDTD` or `T2D14`."""

    fixed: ClassVar[dict[str, str]] = {"layout": "it determines which layers have a router"}

    def layer_types(self, num_layers: int) -> list[str]:
        pattern = expand_layout("bilayer" if self.layout is None else self.layout, num_layers)
        (routed,) = self.layers
        return [DENSE if letter == "T" else routed for letter in pattern]

    def check_shape(self, shape: Shape) -> None:
        super().check_shape(shape)
        if set(shape.layer_types) == {DENSE}:
            raise ConfigError(
                "model.routing.layout", self.layout, f"one with a routed layer (D) among {shape.num_layers}"
            )

    @classmethod
    def from_export(cls, routing: Mapping[str, Any], layer_types: list[str]) -> Self:
        kind = super().from_export(routing, layer_types)
        kind.layout = "".join("T" if layer == DENSE else "D" for layer in layer_types)
        return kind


def expand_layout(layout: str, num_layers: int) -> str:
    """A layout as one letter per layer: T dense, D routed. Raises ConfigError unless it gives `num_layers` layers."""
    half = num_layers // 2
    named = {
        "bilayer": ("TD" * num_layers)[:num_layers],
        "zero_attn": "D" * num_layers,
        "four_attn": "".join("T" if i in (0, 1, half - 1, half) else "D" for i in range(num_layers)),
    }
    if layout in named:
        return named[layout]
    runs = [(letter, int(count or 1)) for letter, count in re.findall(r"([TD])(\d{0,6})", layout)]
    pattern = "".join(letter * min(count, num_layers + 1) for letter, count in runs)
    if not re.fullmatch(r"([TD]\d{0,6})+", layout) or len(pattern) != num_layers:
        raise ConfigError(
            "model.routing.layout",
            layout,
            f"{', '.join(named)}, or letters T and D with counts, such as T2D14, "
            f"for model.num_layers = {num_layers} layers",
        )
    return pattern
