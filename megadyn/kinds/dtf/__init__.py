"""DTF, surprise-based routing over pairs of layers (thesis "Dynamic Transformers", eqs. 3.1-3.13)."""

import math
from dataclasses import dataclass

from megadyn.checks import at_least, in_range
from megadyn.costs.memory import Kept, Workload, backward_bytes, dense_kept, inner_kept, skipping_kept, whole_block
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import DENSE, SHAPES, TopK

DECISION, DYNAMIC = "dtf_decision", "dtf_dynamic"


@dataclass
class Dtf(TopK):
    kind: str = "dtf"
    ma_window: int = 100
    """Tokens in the moving average of the static surprise."""
    prior_factor: float = 0.0625
    """Inner width of the prior's feed-forward, as a share of the hidden size."""
    prior_loss_weight: float = 0.05
    """Weight of the prior's loss, the mean change surprise; it reaches the prior alone."""
    beta_ce_init: float = -0.3
    """Initial beta_ce; its softplus scales the expected-change criterion."""
    beta_cu_init: float = -0.6
    """Initial beta_cu; its softplus scales the unexpected-change criterion."""
    ce_log_offset_init: float = math.log(1.025)
    """Initial lambda_ce, the logarithm of the offset of S_CE. `ce_offset_init`, the offset itself, is the older spelling; it is
    still read, and converted."""
    cu_multiplier_init: float = 1.1
    """Initial m_cu, by which the moving average is multiplied."""

    name = "dtf"
    benchmark = "dtf:0.5"
    title = "Dynamic Transformer (DTF)"
    sentence = ("Layers come in pairs: a Decision layer processes every token and scores how surprising its own effect was; the "
                "Dynamic layer after it processes only the most surprising tokens, the others pass it unchanged.")
    sources = ('thesis "Dynamic Transformers"',)
    tags = ("dynamic-transformer",)
    legend = {
        "S_CE": "S_CE: expected change, mean over tokens", "S_CU": "S_CU: unexpected change, mean over tokens",
        "D_st": "D_st: what the layer changed, mean square", "D_ch": "D_ch: what the prior left unexplained, mean square",
        "beta_ce": "beta_ce, before softplus", "beta_cu": "beta_cu, before softplus",
        "ce_log_offset": "ce_log_offset: lambda_ce, the logarithm of the offset",
        "cu_multiplier": "cu_multiplier"}
    layers = {DECISION: "DecisionLayer", DYNAMIC: "DynamicLayer"}
    scores = ("gate", "log")
    fixed = {"prior_factor": SHAPES}
    recorded = (*TopK.recorded, "ma_window", "prior_factor")

    def check(self) -> None:
        super().check()
        at_least("model.routing.ma_window", self.ma_window, 1)
        in_range("model.routing.prior_factor", self.prior_factor, 0, 4)
        at_least("model.routing.prior_loss_weight", self.prior_loss_weight, 0)
        for name in ("beta_ce_init", "beta_cu_init", "ce_log_offset_init", "cu_multiplier_init"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"model.routing.{name}", getattr(self, name), "a finite number")

    def check_shape(self, shape: Shape) -> None:
        if shape.num_layers < 2:
            raise ConfigError("model.num_layers", shape.num_layers,
                              f"at least 2 with model.routing.kind = {self.kind} (pairs of layers)")

    def layer_types(self, num_layers: int) -> list[str]:
        """Odd layers decide, even ones skip; a last odd one is dense."""
        return [DECISION, DYNAMIC] * (num_layers // 2) + [DENSE] * (num_layers % 2)

    def prior_size(self, shape: Shape) -> int:
        """Inner width of the prior: max(2, ceil(d f) made even) (thesis, section 3)."""
        width = math.ceil(shape.hidden_size * self.prior_factor)
        return max(2, width + width % 2)

    def sizes(self, shape: Shape) -> dict[str, object]:
        return super().sizes(shape) | {"model.routing.prior_factor": f"a prior of width {self.prior_size(shape)}"}

    def to_export(self, shape: Shape) -> dict[str, object]:
        return super().to_export(shape) | {"prior_size": self.prior_size(shape), "gate": "score", "score": "log",
                                           "router_type": "surprise"}

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        if layer == DYNAMIC:
            return flops_of_layer(shape, self.taken(length, share), detached=self.predictor_flops(shape, length))
        prior = 2 * length * shape.hidden_size * self.prior_size(shape) * 3 if layer == DECISION else 0.0
        return flops_of_layer(shape, length, whole=prior)

    def parameters(self, layer: str, shape: Shape) -> int:
        if layer == DECISION:
            return shape.hidden_size + 3 * shape.hidden_size * self.prior_size(shape) + 4
        return self.predictor_parameters(shape) if layer == DYNAMIC else 0

    def kept(self, layer: str, work: Workload) -> Kept:
        if layer == DYNAMIC:
            reads = self.predictor_kept(work)
            return skipping_kept(work, self.share, input=reads, outside=reads + 24 * work.tokens)
        if layer == DENSE:
            return dense_kept(work)
        d, b, n, m = work.model.hidden_size, work.bytes, work.tokens, work.part
        # Both differences and the prior's inner width, all behind the block and so gone before its backward pass.
        prior = m * b * (2 * d + 2 * self.prior_size(work.model))
        compared = m * d * (8 + b + (b if b < 4 else 0))             # gradients of both, in float32, and of the stream
        return Kept(m * b * d, whole_block(work) + prior, inner_kept(work, n, n), 0,
                    max(compared, n * backward_bytes(work) - prior))

    def summed(self, layer: str, work: Workload) -> float:
        return self.summed_if_skipping(work) if layer == DYNAMIC else 1.0


KIND = Dtf
