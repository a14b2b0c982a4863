"""Subjective Timescale Transformer (arXiv 2511.21408): surprise over time decides which updates of a layer are applied."""

from dataclasses import dataclass
from typing import Any

from megadyn.costs.memory import Kept, Workload, backward_bytes, block_kept, dense_kept, inner_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import DENSE
from megadyn.kinds.laid import Laid
from megadyn.kinds.surprise import SURPRISE_LEGEND, Surprising


@dataclass
class Stt(Laid, Surprising):
    kind: str = "stt"

    name = "stt"
    title = "Subjective Timescale Transformer (STT)"
    sentence = (
        "A routed layer updates only the tokens whose change surprises a network that predicts it from the token "
        "before; the others pass it unchanged (arXiv 2511.21408). Training must compute every token's change for that, "
        "so it saves nothing; in use a small network decides before the layer runs."
    )
    sources = ("arXiv 2511.21408",)
    tags = ("subjective-timescale-transformer",)
    verb = "was updated"
    legend = SURPRISE_LEGEND | {
        "prior_loss": "prior_loss: mean squared error of the prediction from the previous token"
    }
    layers = {"stt": "SubjectiveLayer"}
    fixed = Laid.fixed | Surprising.fixed
    rules = ("predictor",)
    variants = {"scale_free": {"scale_free": True}}

    def check(self) -> None:
        if self.by_threshold:
            raise ConfigError(
                "model.routing.choose",
                self.choose,
                f"topk with model.routing.kind = {self.kind}: in use a "
                "score is known only after the layer has run",
            )
        super().check()

    def to_export(self, shape: Shape) -> dict[str, Any]:
        return super().to_export(shape) | {"gate": "score", "score": "log", "router_type": "surprise"}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        """For every token, whatever the share, because training computes all."""
        if layer == DENSE:
            return flops_of_layer(shape, length)
        prior = 2 * length * shape.hidden_size * self.prior_size(shape) * 3
        return flops_of_layer(shape, length, whole=prior, detached=self.predictor_flops(shape, length))

    def parameters(self, layer: str, shape: Shape) -> int:
        if layer == DENSE:
            return 0
        return (
            shape.hidden_size
            + 3 * shape.hidden_size * self.prior_size(shape)
            + 4
            + self.predictor_parameters(shape)
        )

    def kept(self, layer: str, work: Workload) -> Kept:
        """Under sequence parallelism each tensor rank compares all tokens, and runs its part of the heads and widths on them."""
        if layer == DENSE:
            return dense_kept(work)
        d, b, n = work.model.hidden_size, work.bytes, work.tokens
        block = (
            block_kept(work, n, has_own_input=work.parts > 1)
            + n * (work.turned + work.segments) * work.documents
        )
        prior = n * (work.norm(d) + b * d * (b < 4) + 4 * d + 4 * b * self.prior_size(work.model))
        chosen = work.chosen(self.share) * b * d
        return Kept(
            work.part * b * d,
            block + prior,
            inner_kept(work, n, n),
            chosen + self.predictor_kept(work) + 40 * n,
            n * backward_bytes(work),
        )

    def summed(self, layer: str, work: Workload) -> float:
        return 1.5 if layer != DENSE and work.sequence else 1.0


KIND = Stt
