"""Keys of all kinds that score tokens by surprise. No torch."""

import math
from dataclasses import dataclass
from typing import Any

from megadyn.checks import at_least, in_range
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import SHAPES, TRAINED_SO
from megadyn.kinds.topk import TopK

SURPRISE_LEGEND = {
    "S_CE": "S_CE: expected change, mean over tokens",
    "S_CU": "S_CU: unexpected change, mean over tokens",
    "D_st": "D_st: the layer's change of the token, mean square",
    "D_ch": "D_ch: the part of it that the prior did not predict, mean square",
    "beta_ce": "beta_ce, before softplus",
    "beta_cu": "beta_cu, before softplus",
    "ce_log_offset": "ce_log_offset: lambda_ce, the logarithm of the offset",
    "cu_multiplier": "cu_multiplier",
}


@dataclass
class Surprising(TopK):
    """Base of kinds that score a token by how much a layer changed it, compared with a cheap prediction of that change:
    the prior."""

    ma_window: int = 100
    """Tokens in the moving average of the static surprise."""
    prior_factor: float = 0.0625
    """Inner width of the prior's feed-forward, as a share of the hidden size."""
    prior_loss_weight: float = 0.05
    """Weight of the prior's loss, the mean change surprise. Its gradient reaches only the prior."""
    beta_ce_init: float = -0.3
    """Initial beta_ce; its softplus scales the expected-change criterion."""
    beta_cu_init: float = -0.6
    """Initial beta_cu; its softplus scales the unexpected-change criterion."""
    ce_log_offset_init: float = math.log(1.025)
    """Initial lambda_ce, the logarithm of the offset of S_CE. The older spelling `ce_offset_init` (the offset itself)
    is still read and converted."""
    cu_multiplier_init: float = 1.1
    """Initial m_cu, the factor on the moving average."""
    scale_free: bool = False
    """Whether D_st and D_ch are divided by the moving average of D_st, so that neither the size of the layer's updates nor the
    difficulty of a text changes the score."""

    fixed = {"prior_factor": SHAPES, "scale_free": TRAINED_SO}
    recorded = (*TopK.recorded, "ma_window", "prior_factor", "scale_free")
    shared = ("surprise_megadyn.py",)

    def check(self) -> None:
        super().check()
        at_least("model.routing.ma_window", self.ma_window, 1)
        in_range("model.routing.prior_factor", self.prior_factor, 0, 4)
        at_least("model.routing.prior_loss_weight", self.prior_loss_weight, 0)
        for name in ("beta_ce_init", "beta_cu_init", "ce_log_offset_init", "cu_multiplier_init"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"model.routing.{name}", getattr(self, name), "a finite number")

    def prior_size(self, shape: Shape) -> int:
        """Inner width of the prior: max(2, ceil(d f)), rounded up to an even number (thesis, section 3)."""
        width = math.ceil(shape.hidden_size * self.prior_factor)
        return max(2, width + width % 2)

    def sizes(self, shape: Shape) -> dict[str, Any]:
        return super().sizes(shape) | {
            "model.routing.prior_factor": f"a prior of width {self.prior_size(shape)}"
        }

    def to_export(self, shape: Shape) -> dict[str, Any]:
        return super().to_export(shape) | {"prior_size": self.prior_size(shape)}
