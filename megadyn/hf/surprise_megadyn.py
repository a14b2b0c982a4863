"""Surprise: how much a layer changed a token, compared with a prediction. Used by kinds of routing that score tokens by it.

Stand-alone: ships with the weights of these kinds and imports nothing from megadyn.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_megadyn import LayerCache
from .configuration_megadyn import MegadynConfig
from .layers_megadyn import Context, Float32Module, MegadynRMSNorm, SwiGLU, wide
from .packing_megadyn import changes, first_columns, take_rows


class Prior(SwiGLU):
    """PriorFFN(RMSNorm(h)): a cheap prediction of what a layer adds."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config.hidden_size, config.routing["prior_size"])
        self.norm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(self.norm(h))


class SurpriseRouter(Float32Module):
    """The score r = -log(1 - G) from the static surprise D_st, the change surprise D_ch and the moving average of D_st.

    r = softplus(a) + softplus(b), where a and b are the arguments of the two sigmoids in G. It orders tokens as G does,
    and still separates tokens whose G rounds to 1.
    """

    beta_ce: nn.Parameter
    beta_cu: nn.Parameter
    ce_offset: nn.Parameter
    ce_log_offset: nn.Parameter
    cu_multiplier: nn.Parameter

    INITIAL = {"beta_ce": -0.3, "beta_cu": -0.6, "ce_log_offset": math.log(1.025), "cu_multiplier": 1.1}

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.scale_free = config.routing["scale_free"]
        for name in ("beta_ce", "beta_cu", "cu_multiplier"):
            self.register_parameter(name, nn.Parameter(torch.empty(1)))
        # Exports of earlier versions hold the offset, not its logarithm. `from_pretrained` loads it, then converts it.
        offset = "ce_offset" if config.routing["score"] == "gate" else "ce_log_offset"
        self.register_parameter(offset, nn.Parameter(torch.empty(1)))

    def reset(self, std: float) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.025 if name == "ce_offset" else self.INITIAL[name])

    def log_offset(self) -> Tensor:
        return log_of_older(self.ce_offset) if "ce_offset" in self._parameters else wide(self.ce_log_offset)

    def forward(self, static_BC: Tensor, change_BC: Tensor, average_BC: Tensor) -> Tensor:
        beta_ce, beta_cu, cu_multiplier = (wide(x) for x in (self.beta_ce, self.beta_cu, self.cu_multiplier))
        expected_BC, unexpected_BC = static_BC - change_BC, static_BC - cu_multiplier * average_BC
        if self.scale_free:
            expected_BC, unexpected_BC = (
                expected_BC / at_least(average_BC),
                unexpected_BC / at_least(average_BC),
            )
        a_BC = F.softplus(beta_ce) * (expected_BC + self.log_offset())
        b_BC = F.softplus(beta_cu) * unexpected_BC
        return -(F.logsigmoid(-a_BC) + F.logsigmoid(-b_BC))


def log_of_older(offset: Tensor) -> Tensor:
    """lambda_ce of an older export that holds the offset itself, computed as earlier versions did."""
    return (wide(offset) + 1e-10).log()


def at_least(average: Tensor) -> Tensor:
    """A moving average to divide by, not below 1e-12."""
    return average.clamp(min=1e-12)


def gate_of(score: Tensor) -> Tensor:
    """G = 1 - exp(-r). Each branch is accurate in value and gradient on its side."""
    return torch.where(score < 1, -torch.expm1(-score), 1 - torch.exp(-score))


def moving_average(value_BC: Tensor, window: int, context: Context, cache: LayerCache | None) -> Tensor:
    """Mean of the last `window` values, including the current one. Before a text's start its first value is repeated."""
    history_BW = value_BC[:, :1].expand(-1, window - 1)
    if cache is not None and cache.recent_BW is not None:
        recent_BW = take_rows(cache.recent_BW, context.tokens)
        history_BW = torch.where(context.continues_B[:, None], recent_BW, history_BW)
    windows_BCW = torch.cat((history_BW, value_BC), dim=1).unfold(1, window, 1)
    if context.tokens.segment_BC is not None:
        # -1: the history belongs to the same text
        first_BC = first_columns(changes(context.tokens.segment_BC))
        column_C = torch.arange(value_BC.shape[1], device=value_BC.device)
        column_CW = column_C[:, None] + torch.arange(1 - window, 1, device=value_BC.device)
        value_of_first_BC = value_BC.gather(1, first_BC.clamp(min=0))
        is_before_BCW = column_CW < first_BC[..., None]
        is_before_BCW = is_before_BCW & (first_BC >= 0)[..., None]
        windows_BCW = torch.where(is_before_BCW, value_of_first_BC[..., None], windows_BCW)
    if cache is not None:
        cache.keep_latest("recent_BW", windows_BCW[..., 1:].detach(), history_BW, context.tokens)
    return windows_BCW.mean(-1)
