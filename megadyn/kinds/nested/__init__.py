"""Dynamic Nested Depth (arXiv 2510.11001): tokens with a high router score pass the same layer a second time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadyn.costs.memory import Kept, Workload, dense_kept, skipping_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import DENSE, OwnChoice
from megadyn.kinds.laid import Laid


@dataclass
class Nested(Laid, OwnChoice):
    kind: str = "nested"
    capacity: float = 0.2
    """Share of all tokens that a routed layer should process twice; its threshold is adjusted to reach this."""
    threshold_start: float = 0.5
    """The initial threshold; scores are in (0, 1)."""
    threshold_rate: float = 0.02
    """How far the threshold moves per step, in the router's logits, as a share of its estimated distance from where it would
    take `capacity`; 0 holds it."""

    name = "nested"
    title = "Dynamic Nested Depth"
    sentence = (
        "A routed layer processes every token; those whose score, computed from the result, reaches a threshold pass the "
        "same layer a second time, among themselves (arXiv 2510.11001)."
    )
    sources = ("arXiv 2510.11001",)
    tags = ("dynamic-nested-depth",)
    verb = "passed the layer twice"
    layers = {"nested": "NestedLayer"}
    equals_dense = False

    def check(self) -> None:
        super().check()
        if not 0 < self.threshold_start < 1:
            raise ConfigError("model.routing.threshold_start", self.threshold_start, "between 0 and 1")
        if not 0 <= self.threshold_rate <= 1:
            raise ConfigError("model.routing.threshold_rate", self.threshold_rate, "from 0 to 1")

    @property
    def uses_threshold(self) -> bool:
        return True

    def explain(self, measured: Mapping[str, float]) -> str:
        seen = (
            f" At the end of training {measured['routed_fraction']:.1%} did."
            if "routed_fraction" in measured
            else ""
        )
        return (
            f"{self.sentence}\n\nThe rule is the same in training and in use. In training the threshold moved so that "
            f"{self.capacity:.1%} of the tokens pass twice.{seen}"
        )

    def to_export(self, shape: Shape) -> dict[str, Any]:
        return super().to_export(shape) | {"router_type": "linear", "causal": "threshold"}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        first = flops_of_layer(shape, length)
        if layer == DENSE:
            return first
        again = flops_of_layer(shape, self.taken(length, share))
        return LayerFlops(
            first.cut + again.cut, 2 * length * shape.hidden_size, first.attention + again.attention
        )

    def parameters(self, layer: str, shape: Shape) -> int:
        return 0 if layer == DENSE else shape.hidden_size

    def kept(self, layer: str, work: Workload) -> Kept:
        """At the share `model.routing.capacity`. Full recomputation repeats one of the two passes at a time."""
        first = dense_kept(work)
        if layer == DENSE:
            return first
        again = skipping_kept(work, self.capacity)
        # A varying number of tokens attends in segments.
        split = work.chosen(self.capacity) * work.segments * (not work.documents)
        repeated = again.inside + split
        row = work.part * work.model.hidden_size
        between = 4 * row  # the first pass's result, which the router reads in float32
        if work.recompute == "full":
            between += work.bytes * row * (work.bytes < 4)  # the second pass starts from it again
            inside = max(first.inside, repeated)
        else:
            inside = first.inside + repeated
        return Kept(
            first.input,
            inside,
            first.inner + again.inner + split,
            between + 24 * work.tokens,
            max(first.working, again.working),
        )

    def summed(self, layer: str, work: Workload) -> float:
        """All tokens, and those that pass twice once more; under sequence parallelism these are also distributed and
        gathered."""
        if layer == DENSE:
            return 1.0
        return 1.0 + self.capacity * (1.5 if work.sequence else 1.0)


KIND = Nested
