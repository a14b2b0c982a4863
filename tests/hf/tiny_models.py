"""Tiny random stand-alone models on which routing is not trivial."""

import torch
from torch import Tensor

from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM

VOCABULARY = 61
WINDOW = 7
DTF = {"kind": "dtf", "capacity": 0.4, "ma_window": WINDOW, "prior_size": 6, "score": "log"}
MOD = {"kind": "mod", "capacity": 0.4}
LAYOUTS: dict[str, tuple[list[str], dict]] = {
    "dense": (["dense"] * 3, {"kind": "dense"}),
    "dtf4": (["dtf_decision", "dtf_dynamic"] * 2, DTF),
    "dtf5": (["dtf_decision", "dtf_dynamic"] * 2 + ["dense"], DTF),
    "dtf-predictor": (["dense", "dtf_decision", "dtf_dynamic"], DTF | {"causal": "predictor"}),
    "dtf-relative": (
        ["dtf_decision", "dtf_dynamic"] * 2,
        DTF | {"scale_free": True, "relative_gate": True},
    ),
    "mod": (["dense", "mod"] * 2, MOD),
    "mod-identity": (["mod", "dense", "mod"], MOD | {"gate": "identity"}),
    "mod-predictor": (["dense", "mod", "mod"], MOD | {"causal": "predictor"}),
    "mod-bce": (["dense", "mod", "mod"], MOD | {"causal": "bce"}),
    "dtrnet-token": (["dense", "dtrnet"] * 2, {"kind": "dtrnet", "layout": "bilayer"}),
    "dtrnet-expert": (
        ["dtrnet", "dense", "dtrnet"],
        {"kind": "dtrnet", "router_type": "expert_choice", "capacity": 0.4, "score": "logit"},
    ),
    "mod-threshold": (["dense", "mod"], MOD | {"choose": "threshold"}),
    "stt": (["stt", "dense", "stt"], DTF | {"kind": "stt", "score": "log"}),
    "fixed": (["dense", "fixed", "fixed"], {"kind": "fixed", "capacity": 0.4, "seed": 3}),
    "fixed-stride": (["dense", "fixed"], {"kind": "fixed", "capacity": 0.4, "score": "stride", "seed": 0}),
}
"""Layer types and `routing` of each kind of model."""
KINDS = tuple(LAYOUTS)
REST = ("nested", "subskip", "skip_middle")
"""Kinds that only a few tests here try; the conformance suite holds all to the engine."""
LAYOUTS |= {
    "nested": (["dense", "nested"] * 2, {"kind": "nested", "router_type": "linear", "causal": "threshold"}),
    "subskip": (["dense", "subskip"] * 2, {"kind": "subskip", "router_type": "two_halves"}),
    "skip_middle": (
        ["skip_middle_out"] * 2 + ["skip_middle_back"] * 2,
        {"kind": "skip_middle", "router_type": "accumulated"},
    ),
}
MAIN_KINDS = ("dense", "dtf5", "mod", "dtrnet-token", "dtrnet-expert")
NORMALIZATIONS = ("pre", "lns", "hybridnorm")
ROUTED = ("dtf_dynamic", "mod", "dtrnet", "fixed", "stt")
"""The types of layer that choose tokens."""


def tiny_config(kind: str = "dtf4", **changes: object) -> MegadynConfig:
    """`kind` is a key of LAYOUTS."""
    layer_types, routing = LAYOUTS[kind]
    if kind == "dense":  # may have any number of layers
        layer_types = []
    fields: dict = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(layer_types) or 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "attention_bias": True,
        "initializer_range": 0.3,  # large, so that scores differ from token to token
        "routed_layer_types": layer_types,
        "routing": routing,
    }
    return MegadynConfig(**fields | changes)


def tiny_model(kind: str = "dtf4", routing_mode: str = "causal", **changes: object) -> MegadynForCausalLM:
    """In eval mode, all parameters random (biases, norms and router scalars too), rules that route about half."""
    torch.manual_seed(1)
    model = MegadynForCausalLM(tiny_config(kind, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "router" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if name.endswith("router.fc2.weight"):  # dtrnet: probabilities away from 0 and 1
                parameter.mul_(0.1)
    set_thresholds(model, random_tokens(4, 40))
    model.config.routing_mode = routing_mode
    return model


def random_tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def set_thresholds(model: MegadynForCausalLM, tokens: Tensor) -> None:
    """Each rule in the widest gap between scores that routes 35-55 % of `tokens`, so that rounding decides nothing."""
    for i, layer in enumerate(model.model.layers):
        if not hasattr(layer, "causal_router"):
            continue
        score = (
            model(tokens, output_routing=True, use_cache=False)
            .gates[i]
            .flatten()
            .sort(descending=True)
            .values
        )
        low, high = int(0.35 * len(score)), int(0.55 * len(score))
        gap = low + int((score[low - 1 : high - 1] - score[low:high]).argmax())
        middle = (score[gap - 1] + score[gap]) / 2
        if model.config.routing.get("score") == "logit":  # gates are p0 still
            middle = middle.logit()
        if hasattr(layer.causal_router, "threshold"):
            layer.causal_router.threshold.fill_(middle)
        elif model.config.routing["causal"] == "token_choice":  # p0 = sigmoid(attend - bypass), and 0.5 at 0
            layer.router.fc2.bias[1] += middle.logit()
