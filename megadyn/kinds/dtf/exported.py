"""DTF in an exported model: Decision layers score tokens, Dynamic layers process the most surprising ones (see README.md)."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, DenseLayer, RoutedLayer, Routing, Stream, ThresholdRule, wide
from megadyn.hf.surprise_megadyn import Prior, SurpriseRouter, at_least, gate_of, log_of_older, moving_average


def threshold_of_older(tau: Tensor) -> Tensor:
    """Converts a threshold on G to one on r. A threshold of 1 took the tokens whose float32 G rounds to 1: 1 - G < 2^-25."""
    return torch.where(tau < 1, -torch.log1p(-tau), 25 * math.log(2))


def convert_older(model: Any) -> None:
    """Converts a loaded DTF export of an earlier version to the current form, because training would drive its offset
    below 0, to NaN. A model with offloaded weights is left as it is, and runs by the older rules."""
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
            raise ValueError(
                f"router.ce_offset = {layer.ce_offset.item():.3g} has no logarithm: this export gives NaN"
            )
        layer.ce_log_offset = nn.Parameter(value.to(layer.ce_offset.dtype), layer.ce_offset.requires_grad)
        del layer.ce_offset
    model.config.routing["score"] = "log"


def convert_older_state(model: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The same for bare weights, in place, before `load_state_dict` loads them into a model of the current form."""
    older = [name for name in state if name.startswith(prefix) and name.endswith("router.ce_offset")]
    if model.config.routing.get("score") != "log" or not older:
        return
    for name in older:
        state[name.replace("ce_offset", "ce_log_offset")] = log_of_older(state.pop(name))
    for name in list(state):
        if name.startswith(prefix) and name.endswith("causal_router.threshold"):
            state[name] = threshold_of_older(state[name])


class DecisionLayer(DenseLayer):
    """Dense; also scores each token for the following dynamic layer."""

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
    """Processes only tokens selected by the decision layer's score; the gate is G = 1 - exp(-r), or G over its moving average."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.routing = config.routing  # shared, because converting an older export changes its `score`

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        score_BT = cast(Tensor, stream.score_BC)
        gate_BT = gate_of(score_BT)
        factor_BT = gate_BT
        if self.routing["relative_gate"]:
            average_BT = moving_average(gate_BT, self.routing["ma_window"], context, cache)
            factor_BT = gate_BT / at_least(average_BT)
        if self.routing["score"] == "gate":
            score_BT = gate_BT
        return self.route(stream.hidden_BCD, score_BT, factor_BT, context, cache)


def check_pairs(layer_types: list[str]) -> None:
    """Raises ValueError unless dynamic layers follow decision layers, and only these."""
    for i, layer_type in enumerate(layer_types):
        follows_decision = i > 0 and layer_types[i - 1] == "dtf_decision"
        if (layer_type == "dtf_dynamic") != follows_decision:
            raise ValueError(
                f"routed_layer_types[{i}] = {layer_type!r}: every dtf_decision must be followed by a dtf_dynamic, "
                "which may be nowhere else"
            )
    if layer_types[-1] == "dtf_decision":
        raise ValueError("routed_layer_types ends in a dtf_decision without its dtf_dynamic")


EXPORTED = ExportedKind(
    {"dtf_decision": DecisionLayer, "dtf_dynamic": DynamicLayer},
    {
        "surprise": Router(
            ("capacity", "ma_window", "prior_size"),
            {"gate": ("score",), "score": ("gate", "log"), "causal": ("threshold", "predictor")},
            ("scale_free", "relative_gate"),
        )
    },
    check_pairs,
    convert_older,
    convert_older_state,
)
