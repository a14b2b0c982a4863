"""Tiny random stand-alone models on which routing is not trivial."""

import torch
from torch import Tensor

from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM

VOCABULARY = 61
WINDOW = 7
KINDS = ("dense", "dtf4", "dtf5")


def tiny_config(kind: str = "dtf4", **changes: object) -> MegadynConfig:
    """`dense`, or `dtf` and the number of layers."""
    num_layers = 3 if kind == "dense" else int(kind.removeprefix("dtf"))
    fields: dict = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 5000.0,
        "attention_bias": True, "initializer_range": 0.3,      # large, so that scores differ from token to token
    }
    if kind != "dense":
        fields["layer_types"] = ["dtf_decision", "dtf_dynamic"] * (num_layers // 2) + ["dense"] * (num_layers % 2)
        fields["routing"] = {"kind": "dtf", "capacity": 0.4, "ma_window": WINDOW, "prior_size": 6}
    return MegadynConfig(**fields | changes)


def tiny_model(kind: str = "dtf4", routing_mode: str = "causal", **changes: object) -> MegadynForCausalLM:
    """In eval mode, all parameters random (biases, norms and router scalars too), thresholds that route about half."""
    torch.manual_seed(1)
    model = MegadynForCausalLM(tiny_config(kind, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "router" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    set_thresholds(model, random_tokens(4, 40))
    model.config.routing_mode = routing_mode
    return model


def random_tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def set_thresholds(model: MegadynForCausalLM, tokens: Tensor) -> None:
    """Each threshold in the widest gap between scores that routes 35-55 % of `tokens`, so that rounding decides nothing."""
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer, "causal_router"):
            score = model(tokens, output_routing=True, use_cache=False).gates[i].flatten().sort(descending=True).values
            low, high = int(0.35 * len(score)), int(0.55 * len(score))
            gap = low + int((score[low - 1:high - 1] - score[low:high]).argmax())
            layer.causal_router.threshold.fill_((score[gap - 1] + score[gap]).item() / 2)
