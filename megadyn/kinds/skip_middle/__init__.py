"""Skipping the middle layers (arXiv 2506.21103): a token that leaves at a layer comes back at that layer's mirror image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadyn.checks import at_least
from megadyn.costs.memory import Kept, Workload, skipping_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import OwnChoice

OUT, BACK = "skip_middle_out", "skip_middle_back"


@dataclass
class SkipMiddle(OwnChoice):
    kind: str = "skip_middle"
    capacity: float = 0.7
    """Share of tokens that layers should process, averaged over layers; the pressure on the gates is adjusted to reach
    this."""
    pressure_rate: float = 0.001
    """Change per step of the mean gate's weight in the loss, as a multiple of (share - `capacity`)."""

    name = "skip_middle"
    title = "Skip-middle transformer"
    sentence = (
        "Gates that accumulate over the first half of the layers decide how far towards the middle each token goes; "
        "from there it skips to the mirror image, in the second half, of the layer at which it left (arXiv 2506.21103)."
    )
    sources = ("arXiv 2506.21103",)
    tags = ("skip-middle",)
    legend = {"pressure": "pressure: weight of the gates' mean in the loss"}
    layers = {OUT: "LeavingLayer", BACK: "ReturningLayer"}
    totals = ("pressure",)
    held_in_mean = True

    def check(self) -> None:
        super().check()
        at_least("model.routing.pressure_rate", self.pressure_rate, 0)

    def check_shape(self, shape: Shape) -> None:
        if shape.num_layers % 2:
            raise ConfigError(
                "model.num_layers",
                shape.num_layers,
                f"even with model.routing.kind = {self.kind}: each layer has a mirror image",
            )

    def check_run(self, *, pipeline: int, documents: bool) -> None:
        super().check_run(pipeline=pipeline, documents=documents)
        if pipeline > 1:
            raise ConfigError(
                "parallel.pipeline",
                pipeline,
                f"1 with model.routing.kind = {self.kind}: a layer needs the gate "
                "of its mirror image, but only one tensor is sent between stages",
            )

    def layer_types(self, num_layers: int) -> list[str]:
        half = num_layers // 2
        return [OUT] * half + [BACK] * (num_layers - half)

    def explain(self, measured: Mapping[str, float]) -> str:
        seen = ""
        if "routed_fraction" in measured:
            seen = (
                f" At the end of training a layer processed {measured['routed_fraction']:.1%} of the tokens."
            )
        return f"{self.sentence}\n\nThe rule is the same in training and in use.{seen}"

    def to_export(self, shape: Shape) -> dict[str, Any]:
        return super().to_export(shape) | {"router_type": "accumulated"}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        taken = self.taken(length, share)
        return flops_of_layer(shape, taken, whole=2 * length * shape.hidden_size if layer == OUT else 0.0)

    def parameters(self, layer: str, shape: Shape) -> int:
        return shape.hidden_size + 1 if layer == OUT else 0

    def kept(self, layer: str, work: Workload) -> Kept:
        """At the share `model.routing.capacity` in each layer, except for what only one layer at a time needs: that is
        planned with all tokens, because the outermost layers take about all."""
        d, b = work.model.hidden_size, work.bytes
        reads = layer == OUT  # whether it has a router, which reads a float32 copy of the layer's input

        def at(share: float) -> Kept:
            kept = skipping_kept(
                work,
                share,
                input=work.part * b * d * (reads and b == 4),
                outside=work.part * 4 * d * (reads and b < 4) + 40 * work.tokens,
            )
            # A varying number of tokens attends in segments.
            split = work.chosen(share) * work.segments * (not work.documents)
            return kept._replace(inside=kept.inside + split, inner=kept.inner + split)

        mean, outermost = at(self.capacity), at(1.0)
        return mean._replace(
            working=outermost.working, inside=(outermost if work.recompute == "full" else mean).inside
        )

    def summed(self, layer: str, work: Workload) -> float:
        return self.capacity * (1.5 if work.sequence else 1.0)


KIND = SkipMiddle
