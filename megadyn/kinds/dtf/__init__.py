"""DTF, surprise-based routing over pairs of layers (thesis "Dynamic Transformers", eqs. 3.1-3.13)."""

from dataclasses import dataclass

from megadyn.costs.memory import (
    Kept,
    Workload,
    backward_bytes,
    dense_kept,
    inner_kept,
    skipping_kept,
    whole_block,
)
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import DENSE, TRAINED_SO
from megadyn.kinds.surprise import SURPRISE_LEGEND, Surprising

DECISION, DYNAMIC = "dtf_decision", "dtf_dynamic"


@dataclass
class Dtf(Surprising):
    kind: str = "dtf"
    relative_gate: bool = False
    """Whether a chosen token's update is multiplied by G over the moving average of G (over `ma_window` tokens) instead of by
    G, so that training cannot close the gates of all tokens alike."""

    name = "dtf"
    benchmark = "dtf:0.5"
    title = "Dynamic Transformer (DTF)"
    sentence = (
        "Layers come in pairs: a Decision layer processes every token and scores how surprising its own effect was; the "
        "Dynamic layer after it processes only the most surprising tokens, the others pass it unchanged."
    )
    sources = ('thesis "Dynamic Transformers"',)
    tags = ("dynamic-transformer",)
    legend = SURPRISE_LEGEND
    layers = {DECISION: "DecisionLayer", DYNAMIC: "DynamicLayer"}
    scores = ("gate", "log")
    variants = {
        "threshold": {"choose": "threshold", "threshold_start": 1},
        "relative": {"scale_free": True, "relative_gate": True},
    }
    recorded = (*Surprising.recorded, "relative_gate")
    fixed = Surprising.fixed | {"relative_gate": TRAINED_SO}

    @property
    def has_signed_gate(self) -> bool:
        return self.relative_gate

    def check(self) -> None:
        super().check()
        if self.relative_gate and self.ma_window == 1:
            raise ConfigError(
                "model.routing.ma_window",
                1,
                "at least 2 with model.routing.relative_gate: a gate over itself is 1",
            )

    def check_shape(self, shape: Shape) -> None:
        if shape.num_layers < 2:
            raise ConfigError(
                "model.num_layers",
                shape.num_layers,
                f"at least 2 with model.routing.kind = {self.kind} (pairs of layers)",
            )

    def layer_types(self, num_layers: int) -> list[str]:
        """Odd layers decide, even ones skip; if the number is odd, the last layer is dense."""
        return [DECISION, DYNAMIC] * (num_layers // 2) + [DENSE] * (num_layers % 2)

    def to_export(self, shape: Shape) -> dict[str, object]:
        return super().to_export(shape) | {"gate": "score", "score": "log", "router_type": "surprise"}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        if layer == DYNAMIC:
            return flops_of_layer(
                shape, self.taken(length, share), detached=self.predictor_flops(shape, length)
            )
        prior = 2 * length * shape.hidden_size * self.prior_size(shape) * 3 if layer == DECISION else 0.0
        return flops_of_layer(shape, length, whole=prior)

    def parameters(self, layer: str, shape: Shape) -> int:
        if layer == DECISION:
            return shape.hidden_size + 3 * shape.hidden_size * self.prior_size(shape) + 4
        return self.predictor_parameters(shape) if layer == DYNAMIC else 0

    def kept(self, layer: str, work: Workload) -> Kept:
        if layer == DYNAMIC:
            reads = self.predictor_kept(work)
            return skipping_kept(
                work, self.share, input=reads, outside=reads + 24 * work.tokens, varies=self.varies
            )
        if layer == DENSE:
            return dense_kept(work)
        d, b, n, m = work.model.hidden_size, work.bytes, work.tokens, work.part
        # Both differences and the prior's inner activations. They come after the block, so they are freed before its
        # backward pass.
        prior = m * b * (2 * d + 2 * self.prior_size(work.model))
        # Gradients of both in float32, and that of the residual stream.
        compared = m * d * (8 + b + (b if b < 4 else 0))
        return Kept(
            m * b * d,
            whole_block(work) + prior,
            inner_kept(work, n, n),
            0,
            max(compared, n * backward_bytes(work) - prior),
        )

    def summed(self, layer: str, work: Workload) -> float:
        return self.summed_if_skipping(work) if layer == DYNAMIC else 1.0


KIND = Dtf
