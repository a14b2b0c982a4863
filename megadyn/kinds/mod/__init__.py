"""Mixture-of-Depths (arXiv 2404.02258): a learned score picks the tokens that a layer processes."""

from dataclasses import dataclass

from megadyn.checks import at_least, one_of
from megadyn.costs.memory import Kept, Workload, dense_kept, skipping_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.kinds.kind import DENSE, TRAINED_SO
from megadyn.kinds.laid import Laid
from megadyn.kinds.topk import TopK


@dataclass
class Mod(Laid, TopK):
    kind: str = "mod"
    gate: str = "sigmoid"
    """Factor on a token's update: `sigmoid` of its logit, or the logit itself (`identity`, as in the paper)."""
    bce_loss_weight: float = 0.01
    """Weight of the binary cross-entropy of the logit against the top-k choice."""
    z_loss_weight: float = 1e-4
    """Weight of the mean squared logit."""

    name = "mod"
    benchmark = "mod:0.125"
    title = "Mixture-of-Depths"
    sentence = (
        "A routed layer processes the tokens that a learned linear score selects; the others pass it unchanged (arXiv "
        "2404.02258)."
    )
    sources = ("arXiv 2404.02258",)
    tags = ("mixture-of-depths",)
    legend = {
        "logit": "logit: mean of the router's scores",
        "logit_std": "logit_std: their standard deviation",
        "bce_loss": "bce_loss: cross-entropy of the scores against top-k's choice",
        "z_loss": "z_loss: mean squared score",
    }
    layers = {"mod": "ModLayer"}
    fixed = Laid.fixed | {"gate": TRAINED_SO}
    rules = ("threshold", "predictor", "bce")
    recorded = (*TopK.recorded, "gate")
    variants = {
        "identity": {"gate": "identity", "capacity": 0.3},
        "threshold": {"capacity": 0.3, "choose": "threshold", "threshold_start": 1},
    }
    default_capacity = 0.125

    def check(self) -> None:
        super().check()
        one_of("model.routing.gate", self.gate, ("sigmoid", "identity"))
        at_least("model.routing.bce_loss_weight", self.bce_loss_weight, 0)
        at_least("model.routing.z_loss_weight", self.z_loss_weight, 0)

    @property
    def has_signed_gate(self) -> bool:
        return self.gate == "identity"

    def to_export(self, shape: Shape) -> dict[str, object]:
        return super().to_export(shape) | {"router_type": "linear"}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        if layer == DENSE:
            return flops_of_layer(shape, length)
        return flops_of_layer(
            shape,
            self.taken(length, share),
            whole=2 * length * shape.hidden_size,
            detached=self.predictor_flops(shape, length),
        )

    def parameters(self, layer: str, shape: Shape) -> int:
        return 0 if layer == DENSE else shape.hidden_size + self.predictor_parameters(shape)

    def kept(self, layer: str, work: Workload) -> Kept:
        if layer == DENSE:
            return dense_kept(work)
        d, b = work.model.hidden_size, work.bytes
        reads = self.predictor_kept(work)
        widened = work.part * 4 * d * (b < 4)  # scores are computed from a float32 copy of the input
        return skipping_kept(
            work,
            self.share,
            input=max(reads, work.part * b * d * (b == 4)),
            outside=widened + reads + 32 * work.tokens,
            varies=self.varies,
        )

    def summed(self, layer: str, work: Workload) -> float:
        return 1.0 if layer == DENSE else self.summed_if_skipping(work)


KIND = Mod
