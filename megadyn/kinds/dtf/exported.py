"""DTF in an exported model: Decision layers score tokens, Dynamic layers process the most surprising (see README.md)."""

import math
from typing import Any, cast

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
    ThresholdRule,
    changes,
    first_columns,
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
    """The score r = -log(1 - G) from the static surprise D_st, the change surprise D_ch and the moving average of D_st.

    r = softplus(a) + softplus(b), a and b being the arguments of the sigmoids that make up G: it orders tokens as G does,
    and keeps apart those whose G rounds to 1.
    """

    beta_ce: nn.Parameter
    beta_cu: nn.Parameter
    ce_offset: nn.Parameter
    ce_log_offset: nn.Parameter
    cu_multiplier: nn.Parameter

    INITIAL = {"beta_ce": -0.3, "beta_cu": -0.6, "ce_log_offset": math.log(1.025), "cu_multiplier": 1.1}

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        for name in ("beta_ce", "beta_cu", "cu_multiplier"):
            self.register_parameter(name, nn.Parameter(torch.empty(1)))
        # Exports of earlier versions hold the offset, not its logarithm: `from_pretrained` loads it as it is, then converts it.
        offset = "ce_offset" if config.routing["score"] == "gate" else "ce_log_offset"
        self.register_parameter(offset, nn.Parameter(torch.empty(1)))

    def reset(self, std: float) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.025 if name == "ce_offset" else self.INITIAL[name])

    def log_offset(self) -> Tensor:
        return log_of_older(self.ce_offset) if "ce_offset" in self._parameters else wide(self.ce_log_offset)

    def forward(self, static_BC: Tensor, change_BC: Tensor, average_BC: Tensor) -> Tensor:
        beta_ce, beta_cu, cu_multiplier = (wide(x) for x in (self.beta_ce, self.beta_cu, self.cu_multiplier))
        a_BC = F.softplus(beta_ce) * (static_BC - change_BC + self.log_offset())
        b_BC = F.softplus(beta_cu) * (static_BC - cu_multiplier * average_BC)
        return -(F.logsigmoid(-a_BC) + F.logsigmoid(-b_BC))


def log_of_older(offset: Tensor) -> Tensor:
    """lambda_ce of an export that holds the offset itself, as earlier versions computed it."""
    return (wide(offset) + 1e-10).log()


def threshold_of_older(tau: Tensor) -> Tensor:
    """The threshold on r for one on G. One of 1 took the tokens whose G rounds to 1 in float32: those with 1 - G < 2^-25."""
    return torch.where(tau < 1, -torch.log1p(-tau), 25 * math.log(2))


def convert_older(model: Any) -> None:
    """Gives a DTF export of an earlier version, as loaded, today's form: training would drive its offset below 0, to NaN.
    Where weights are offloaded it stays as it is, and runs by the older rules."""
    layers = [module for module in model.modules() if isinstance(module, SurpriseRouter | ThresholdRule)]
    offloaded = any(tensor.is_meta for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    if model.config.routing.get("score") != "gate" or offloaded:
        return
    for layer in layers:
        if isinstance(layer, ThresholdRule):
            layer.threshold.copy_(threshold_of_older(layer.threshold))
            continue
        value = layer.log_offset().detach()
        if not value.isfinite().all():
            raise ValueError(f"router.ce_offset = {layer.ce_offset.item():.3g} has no logarithm: this export gives NaN")
        layer.ce_log_offset = nn.Parameter(value.to(layer.ce_offset.dtype), layer.ce_offset.requires_grad)
        del layer.ce_offset
    model.config.routing["score"] = "log"


def convert_older_state(model: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The same for the weights alone, in place, before `load_state_dict` puts them into a model of today's form."""
    older = [name for name in state if name.startswith(prefix) and name.endswith("router.ce_offset")]
    if model.config.routing.get("score") != "log" or not older:
        return
    for name in older:
        state[name.replace("ce_offset", "ce_log_offset")] = log_of_older(state.pop(name))
    for name in list(state):
        if name.startswith(prefix) and name.endswith("causal_router.threshold"):
            state[name] = threshold_of_older(state[name])


def moving_average(value_BC: Tensor, window: int, context: Context, cache: LayerCache | None) -> Tensor:
    """Mean of the last `window` values including the own; before the start of a text its first value counts."""
    history_BW = value_BC[:, :1].expand(-1, window - 1)
    if cache is not None and cache.recent_BW is not None:
        history_BW = torch.where(context.continues_B[:, None], cache.recent_BW, history_BW)
    windows_BCW = torch.cat((history_BW, value_BC), dim=1).unfold(1, window, 1)
    if context.tokens.segment_BC is not None:
        first_BC = first_columns(changes(context.tokens.segment_BC))      # -1: the history is that of its own text
        column_C = torch.arange(value_BC.shape[1], device=value_BC.device)
        column_CW = column_C[:, None] + torch.arange(1 - window, 1, device=value_BC.device)
        value_of_first_BC = value_BC.gather(1, first_BC.clamp(min=0))
        is_before_BCW = column_CW < first_BC[..., None]
        is_before_BCW = is_before_BCW & (first_BC >= 0)[..., None]
        windows_BCW = torch.where(is_before_BCW, value_of_first_BC[..., None], windows_BCW)
    if cache is not None:
        count_B = torch.tensor(context.tokens.counts, device=value_BC.device)
        row_B = torch.arange(len(count_B), device=value_BC.device)
        last_BW = windows_BCW[row_B, (count_B - 1).clamp(min=0), 1:]
        cache.recent_BW = torch.where(count_B[:, None] > 0, last_BW, history_BW)
    return windows_BCW.mean(-1)


class DecisionLayer(DenseLayer):
    """Dense for every token; scores each for the dynamic layer that follows."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.window = config.routing["ma_window"]
        self.prior = Prior(config)
        self.router = SurpriseRouter(config)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        (post, _), routing = super().forward(stream, context, cache)
        h = stream.hidden_BCD
        prior = wide(h) + wide(self.prior(h))
        static_BC = (wide(post) - wide(h)).square().mean(-1)
        change_BC = (wide(post) - wide(prior)).square().mean(-1)
        average_BC = moving_average(static_BC.detach(), self.window, context, cache)
        return Stream(post, self.router(static_BC, change_BC, average_BC)), routing


class DynamicLayer(RoutedLayer):
    """Only tokens that the decision layer's score selects; the gate is G = 1 - exp(-r)."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.routing = config.routing      # whose `score` changes where an older export is converted

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        score_BT = cast(Tensor, stream.score_BC)
        # Either form is accurate in value and gradient on its side.
        gate_BT = torch.where(score_BT < 1, -torch.expm1(-score_BT), 1 - torch.exp(-score_BT))
        if self.routing["score"] == "gate":
            score_BT = gate_BT
        return self.route(stream.hidden_BCD, score_BT, gate_BT, context, cache)


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
    {"surprise": Router(("capacity", "ma_window", "prior_size"),
                        {"gate": ("score",), "score": ("gate", "log"), "causal": ("threshold", "predictor")})},
    check_pairs, convert_older, convert_older_state)
