"""The model's configuration, ours <-> Hugging Face's config.json. Weights need no such map: they bear HF's names throughout."""

from typing import Any

from megadyn.config.dense_map import (
    DEFAULTS,
    TITLES,
    blocks_of,
    difference,
    turns_of,
    window_fields,
    window_of,
)
from megadyn.config.model import ModelConfig
from megadyn.config.rope_map import from_hf_rope, to_hf_rope
from megadyn.errors import ConfigError, UserError
from megadyn.kinds import DENSE, Kind, find_kind

FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "qkv_bias": "attention_bias",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
"""Ours: theirs."""

DENSE_TYPES = tuple(TITLES)
"""Architectures of transformers that are dense models of ours."""


def to_hf_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a megadyn export, but for what it says of documents (`document_fields`)."""
    return {
        "model_type": "megadyn",
        "architectures": ["MegadynForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_megadyn.MegadynConfig",
            "AutoModel": "modeling_megadyn.MegadynModel",
            "AutoModelForCausalLM": "modeling_megadyn.MegadynForCausalLM",
        },
        **shared_fields(model, dtype),
        "attention_output_bias": model.output_bias,
        "qk_norm": model.qk_norm,
        "final_logit_softcapping": model.logit_softcap,
        "no_rope_layers": no_rope_layers(model) if model.rope.skip_layers else None,
        "sliding_window": model.sliding_window,
        "sliding_layers": sliding_layers(model),
        "normalization": model.normalization,
        "routing_mode": "causal",
        "routed_layer_types": model.layer_types,
        "routing": model.routing.to_export(model),
    }


def to_dense_config(model: ModelConfig, style: str, dtype: str) -> dict[str, Any]:
    """config.json of a dense model as plain `style`, one of DENSE_TYPES, into which it fits (`misfit`)."""
    fields = shared_fields(model, dtype) | {"attention_bias": model.qkv_bias or model.output_bias}
    if style in ("qwen2", "mistral"):  # which have no choice
        del fields["attention_bias"]
    fields |= window_fields(model, style)
    if style == "smollm3":
        fields["no_rope_layers"] = no_rope_layers(model)
    return {
        "model_type": style,
        "architectures": [f"{TITLES[style]}ForCausalLM"],
        **fields,
    }


def shared_fields(model: ModelConfig, dtype: str) -> dict[str, Any]:
    return (
        {theirs: getattr(model, ours) for ours, theirs in FIELDS.items()}
        | {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True, "dtype": dtype}
        | to_hf_rope(model)
    )


def no_rope_layers(model: ModelConfig) -> list[int]:
    """SmolLM3's list: 1 for a layer with rotary positions, 0 for one without."""
    return [int(layer not in model.rope.skip_layers) for layer in range(model.num_layers)]


def sliding_layers(model: ModelConfig) -> list[int] | None:
    """Per layer: 1 if its attention has the sliding window. None if all have it or none."""
    if len(model.window_layers or ()) in (0, model.num_layers):
        return None
    return [int(model.window_of(layer) is not None) for layer in range(model.num_layers)]


ONLY = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "mlp_bias": False}
"""Keys of config.json that must have this value, where they stand: we compute nothing else."""

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Of layers of a dense architecture; `window_of` has the window of the second."""

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json of megadyn or of one of DENSE_TYPES describes. UserError for what we cannot run."""
    try:
        return _described(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.json: a value of a wrong type ({error})") from error


def _described(config: dict[str, Any]) -> ModelConfig:
    kind = config.get("model_type")
    if kind != "megadyn" and kind not in DENSE_TYPES:
        raise UserError(
            f"model_type {kind!r} in config.json: must be one of megadyn, {', '.join(DENSE_TYPES)}{difference(kind)}"
        )
    config = DEFAULTS.get(kind, {}) | config
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} = {config[key]!r} in config.json: must be {value!r}")
    if missing := [theirs for theirs in NEEDED if theirs not in config]:
        raise UserError(f"config.json has no {missing[0]}")
    values = {ours: config[theirs] for ours, theirs in FIELDS.items() if config.get(theirs) is not None}
    for ours, value in values.items():
        if not isinstance(value, (int, float)):
            raise UserError(f"{FIELDS[ours]} = {value!r} in config.json: must be a number or a truth value")
    layer_types = _layer_types(config) if kind == "megadyn" else []
    if kind != "megadyn" and (other := set(config.get("layer_types") or []) - ATTENTION_TYPES):
        raise UserError(f"layer_types in config.json: {min(other)!r} is no attention of ours")
    model = ModelConfig(
        **values | blocks_of(config),
        rope=from_hf_rope(config, config.get("default_theta", 10000.0)),
        normalization=config.get("normalization", "pre"),
        routing=_from_hf_routing(config.get("routing", {}), layer_types),
    )
    model.rope.skip_layers = [layer for layer, turn in enumerate(turns_of(config)) if not turn]
    if window := window_of(config):
        model.sliding_window, model.window_layers = window
    model.routing.check()
    model.check()
    if layer_types and layer_types != model.layer_types:
        raise UserError(
            f"routed_layer_types in config.json: must be {model.layer_types} for routing.kind = {model.routing.name}"
        )
    return model


def _layer_types(config: dict[str, Any]) -> list[str]:
    """The kind of each layer. Older exports keep it under transformers' name `layer_types`, as MegadynConfig reads it too
    (not imported from there: that file needs transformers, which training does without)."""
    ours, theirs = config.get("routed_layer_types") or [], config.get("layer_types") or []
    if not theirs or set(theirs) == {"full_attention"}:
        return ours
    if ours and ours != theirs:
        raise UserError(
            f"layer_types = {theirs!r} in config.json: must be left out, because routed_layer_types has other values"
        )
    return theirs


def document_fields(eod: int | None) -> dict[str, Any]:
    """What config.json says of documents inside a sample; `eod` is None for a run that did not mask them."""
    return {"document_mask": False} if eod is None else {"document_mask": True, "eod_token_id": eod}


def eod_of_masked(config: dict[str, Any]) -> int | None:
    """The token that ends a document if the model was trained with masked documents, else None."""
    if not config.get("document_mask"):
        return None
    eod = config.get("eod_token_id")
    if type(eod) is not int:
        raise UserError(
            f"eod_token_id = {eod!r} in config.json: must be a token's id, because document_mask is true"
        )
    return eod


def _from_hf_routing(routing: dict[str, Any], layer_types: list[str]) -> Kind:
    name = routing.get("module", routing.get("kind", DENSE))
    if not isinstance(name, str):
        raise UserError(f"routing.kind = {name!r} in config.json: must be the name of a kind")
    try:
        return find_kind(name).from_export(routing, layer_types)
    except ConfigError as error:
        raise UserError(f"config.json: {error}") from None
