"""The model's configuration, ours <-> Hugging Face's config.json. Weights need no such map: they bear HF's names throughout."""

from typing import Any

from megadyn.config import ModelConfig
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

DENSE_TYPES = ("qwen2", "llama", "mistral")


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
        **_shared_fields(model, dtype),
        "normalization": model.normalization,
        "routing_mode": "causal",
        "routed_layer_types": model.layer_types,
        "routing": model.routing.to_export(model),
    }


def to_qwen2_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a dense model as plain Qwen2, whose q, k and v always have a bias."""
    fields = _shared_fields(model, dtype)
    del fields["attention_bias"]
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **fields,
        "use_sliding_window": False,
    }


def _shared_fields(model: ModelConfig, dtype: str) -> dict[str, Any]:
    return {theirs: getattr(model, ours) for ours, theirs in FIELDS.items()} | {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }


ONLY = {"hidden_act": "silu", "use_sliding_window": False, "partial_rotary_factor": 1.0, "mlp_bias": False}
"""Keys of config.json that must have this value, where they stand: we compute nothing else."""

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json of megadyn, Qwen2, Llama or Mistral describes. UserError for what we cannot run."""
    try:
        return _described(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.json: a value of a wrong type ({error})") from error


def _described(config: dict[str, Any]) -> ModelConfig:
    kind = config.get("model_type")
    if kind != "megadyn" and kind not in DENSE_TYPES:
        raise UserError(
            f"model_type {kind!r} in config.json: must be one of megadyn, {', '.join(DENSE_TYPES)}"
        )
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} = {config[key]!r} in config.json: must be {value!r}")
    if kind == "mistral" and config.get("sliding_window"):
        raise UserError(f"sliding_window = {config['sliding_window']!r} in config.json: must be null")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(
            f"rope_type {rope.get('rope_type')!r} in config.json: only default rotary positions are supported"
        )
    if missing := [theirs for theirs in NEEDED if theirs not in config]:
        raise UserError(f"config.json has no {missing[0]}")
    values = {ours: config[theirs] for ours, theirs in FIELDS.items() if config.get(theirs) is not None}
    for ours, value in values.items():
        if not isinstance(value, (int, float)):
            raise UserError(f"{FIELDS[ours]} = {value!r} in config.json: must be a number or a truth value")
    values["qkv_bias"] = kind == "qwen2" or bool(config.get("attention_bias"))
    if kind == "llama" and values["qkv_bias"]:
        raise UserError(
            "attention_bias = True in config.json: Llama then has a bias on its output projection, which we have not"
        )
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    layer_types = _layer_types(config) if kind == "megadyn" else []
    model = ModelConfig(
        **values,
        rope_theta=float(theta),
        normalization=config.get("normalization", "pre"),
        routing=_from_hf_routing(config.get("routing", {}), layer_types),
    )
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
