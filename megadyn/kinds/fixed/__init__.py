"""A control: the tokens that a layer processes depend only on their positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadyn.checks import one_of
from megadyn.costs.memory import Kept, Workload, dense_kept, skipping_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import DENSE
from megadyn.kinds.laid import Laid
from megadyn.kinds.topk import Capped


@dataclass
class Fixed(Laid, Capped):
    kind: str = "fixed"
    score: str = "random"
    """`random` (a hash; in training new for each sample and step) or `stride` (positions spread evenly, always the same)."""
    seed: int = 0
    """Seed of the hash, in [0, 2^32)."""

    name = "fixed"
    title = "Control with a fixed choice of tokens"
    sentence = (
        "A routed layer processes tokens chosen by position alone, at random or evenly spread; the others pass it "
        "unchanged. It learns no choice: a control for kinds that do."
    )
    tags = ("routing-control",)
    layers = {"fixed": "FixedLayer"}
    rules = ("sign",)
    recorded = (*Capped.recorded, "score", "seed")
    variants = {"stride": {"score": "stride", "capacity": 0.3}}

    def check(self) -> None:
        super().check()
        one_of("model.routing.score", self.score, ("random", "stride"))
        if not 0 <= self.seed < 2**32:
            raise ConfigError("model.routing.seed", self.seed, "in [0, 2^32)")

    def explain(self, measured: Mapping[str, float]) -> str:
        if self.score == "stride":
            return f"{self.sentence}\n\nIn training and in use alike these are {self.share:.1%} of the positions, evenly spread."
        return (
            f"{self.sentence}\n\n**In training** a routed layer takes exactly {self.share:.1%} of a sequence's tokens, drawn "
            'newly for each sample and step. **In use** (`config.routing_mode = "causal"`) a hash of the layer and the '
            f"position takes each with probability {self.share:g}, always the same."
        )

    def to_export(self, shape: Shape) -> dict[str, Any]:
        return super().to_export(shape) | {"router_type": "fixed", "causal": self.rule}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        return flops_of_layer(shape, length if layer == DENSE else self.taken(length, share))

    def kept(self, layer: str, work: Workload) -> Kept:
        if layer == DENSE:
            return dense_kept(work)
        return skipping_kept(work, self.share, outside=16 * work.tokens)

    def summed(self, layer: str, work: Workload) -> float:
        return 1.0 if layer == DENSE else self.summed_if_skipping(work)


KIND = Fixed
