"""DTF in an exported model: Decision layers score tokens, Dynamic layers process the most surprising (see README.md)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import (
    Context,
    DenseLayer,
    Float32Module,
    LayerCache,
    MegadynRMSNorm,
    RoutedLayer,
    Routing,
    Stream,
    SwiGLU,
    wide,
)


class Prior(SwiGLU):
    """PriorFFN(RMSNorm(h)): a cheap prediction of what the layer adds."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config.hidden_size, config.routing["prior_size"])
        self.norm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(self.norm(h))


class SurpriseRouter(Float32Module):
    """The gate G from the static surprise D_st, the change surprise D_ch and the moving average of D_st."""

    INITIAL = {"beta_ce": -0.3, "beta_cu": -0.6, "ce_offset": 1.025, "cu_multiplier": 1.1}

    def __init__(self) -> None:
        super().__init__()
        for name in self.INITIAL:
            self.register_parameter(name, nn.Parameter(torch.empty(1)))

    def reset(self, std: float) -> None:
        for name, value in self.INITIAL.items():
            nn.init.constant_(getattr(self, name), value)

    def forward(self, static_BC: Tensor, change_BC: Tensor, average_BC: Tensor) -> Tensor:
        beta_ce, beta_cu, ce_offset, cu_multiplier = (wide(getattr(self, name)) for name in self.INITIAL)
        expected = static_BC - (change_BC - (ce_offset + 1e-10).log())
        unexpected = static_BC - cu_multiplier * average_BC
        s_ce = (F.softplus(beta_ce) * expected).sigmoid()
        s_cu = (F.softplus(beta_cu) * unexpected).sigmoid()
        return s_ce + s_cu - s_ce * s_cu


def moving_average(value_BC: Tensor, window: int, context: Context, cache: LayerCache | None) -> Tensor:
    """Mean of the last `window` values including the own; before a row's start its first value counts."""
    history_BW = value_BC[:, :1].expand(-1, window - 1)
    if cache is not None and cache.recent_BW is not None:
        history_BW = torch.where(context.started_B[:, None], cache.recent_BW, history_BW)
    values = torch.cat((history_BW, value_BC), dim=1)
    if cache is not None:
        count_B = torch.tensor(context.tokens.counts, device=values.device)
        cache.recent_BW = values.gather(1, count_B[:, None] + torch.arange(window - 1, device=values.device))
    return values.unfold(1, window, 1).mean(-1)


class DecisionLayer(DenseLayer):
    """Dense for every token; scores each for the dynamic layer that follows."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.window = config.routing["ma_window"]
        self.prior = Prior(config)
        self.router = SurpriseRouter()

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        (post, _), routing = super().forward(stream, context, cache)
        h = stream.hidden_BCD
        prior = wide(h) + wide(self.prior(h))
        static_BC = (wide(post) - wide(h)).square().mean(-1)
        change_BC = (wide(post) - wide(prior)).square().mean(-1)
        average_BC = moving_average(static_BC.detach(), self.window, context, cache)
        return Stream(post, self.router(static_BC, change_BC, average_BC)), routing


class DynamicLayer(RoutedLayer):
    """Only tokens that the decision layer's gate selects."""

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        gate_BT = cast(Tensor, stream.gate_BC)
        return self.route(stream.hidden_BCD, gate_BT, gate_BT, context, cache)


def check_pairs(layer_types: list[str]) -> None:
    """ValueError unless a dynamic layer follows each decision layer, and only it."""
    for i, layer_type in enumerate(layer_types):
        follows_decision = i > 0 and layer_types[i - 1] == "dtf_decision"
        if (layer_type == "dtf_dynamic") != follows_decision:
            raise ValueError(f"routed_layer_types[{i}] = {layer_type!r}: a dtf_dynamic layer follows each dtf_decision, "
                             "and only it")
    if layer_types[-1] == "dtf_decision":
        raise ValueError("routed_layer_types ends in a dtf_decision without its dtf_dynamic")


EXPORTED = ExportedKind(
    {"dtf_decision": DecisionLayer, "dtf_dynamic": DynamicLayer},
    {"surprise": Router(("capacity", "ma_window", "prior_size"), {"gate": ("score",), "causal": ("threshold", "predictor")})},
    check_pairs)
