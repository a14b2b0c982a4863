"""SkipGPT (arXiv 2506.04179): each token skips attention, the feed-forward, both or neither."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadyn.checks import at_least, in_range
from megadyn.costs.memory import Kept, Workload, dense_kept, router_kept, skipping_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.kinds.kind import DENSE, OwnChoice
from megadyn.kinds.laid import Laid


@dataclass
class Subskip(Laid, OwnChoice):
    kind: str = "subskip"
    capacity: float = 0.5
    """Share of all halves (a token's attention, a token's feed-forward) that routed layers should keep."""
    keep_loss_weight: float = 1.0
    """Weight of the squared difference between the share kept and `capacity`."""
    temperature_end: float = 0.1
    """The temperature of the Gumbel-softmax falls from 1 to this."""
    temperature_steps: int = 10_000
    """Steps over which the temperature falls, usually the length of the run."""

    name = "subskip"
    title = "SkipGPT"
    sentence = (
        "In a routed layer two small routers decide for each token whether it goes through attention and whether it goes "
        "through the feed-forward; a part that it skips does not change it (arXiv 2506.04179)."
    )
    sources = ("arXiv 2506.04179",)
    tags = ("skipgpt",)
    verb = "was processed, counted by the operations of attention and feed-forward"
    legend = {
        "attention_fraction": "attention_fraction: share of tokens that attended",
        "mlp_fraction": "mlp_fraction: share of tokens that went through the feed-forward",
        "kept": "kept: mean of the two",
        "temperature": "temperature of the Gumbel-softmax",
    }
    layers = {"subskip": "SubskipLayer"}
    totals = ("kept",)
    straight_through = True
    held_in_mean = True
    gate_is_chance = True

    def check(self) -> None:
        super().check()
        in_range("model.routing.temperature_end", self.temperature_end, 0, 1)
        at_least("model.routing.temperature_steps", self.temperature_steps, 1)
        at_least("model.routing.keep_loss_weight", self.keep_loss_weight, 0)

    def explain(self, measured: Mapping[str, float]) -> str:
        seen = ""
        if {"attention_fraction", "mlp_fraction"} <= measured.keys():
            seen = (
                f" At the end of training {measured['attention_fraction']:.1%} of the tokens attended, and "
                f"{measured['mlp_fraction']:.1%} went through the feed-forward."
            )
        return (
            f"{self.sentence}\n\nIn training the routers' choices are random draws, in which the likelier one comes up more "
            f"often; in use the likelier one is always taken.{seen}"
        )

    def to_export(self, shape: Shape) -> dict[str, Any]:
        return super().to_export(shape) | {"router_type": "two_halves"}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        """`share`: the share of tokens that would cost as much if each were kept in both halves (`routed_fraction`)."""
        if layer == DENSE:
            return flops_of_layer(shape, length)
        d = shape.hidden_size
        routers = 2 * 2 * length * (d * (d // 4) + 2 * (d // 4))
        return flops_of_layer(shape, self.taken(length, share), whole=routers)

    def parameters(self, layer: str, shape: Shape) -> int:
        d = shape.hidden_size
        return 0 if layer == DENSE else 2 * ((d + 1) * (d // 4) + 2 * (d // 4) + 2)

    def kept(self, layer: str, work: Workload) -> Kept:
        """At the share `model.routing.capacity` in both halves."""
        if layer == DENSE:
            return dense_kept(work)
        d, b, m, c = work.model.hidden_size, work.bytes, work.part, work.chosen(self.capacity)
        block = skipping_kept(work, self.capacity)
        split = c * work.segments * (not work.documents)  # a varying number of tokens attends in segments
        routers = 2 * router_kept(work, d // 4) + 64 * work.tokens
        inside = block.inside + c * b * d + split  # attention's own update is also kept
        return Kept(m * b * d, inside, block.inner + split, routers, block.working)

    def summed(self, layer: str, work: Workload) -> float:
        """Under sequence parallelism, chosen tokens are summed once more in each half, when they are gathered from the parts."""
        if layer == DENSE:
            return 1.0
        return self.capacity * (2.0 if work.sequence else 1.0)


KIND = Subskip
