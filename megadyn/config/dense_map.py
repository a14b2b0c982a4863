"""How the dense architectures of transformers differ from each other, and from what we can express."""

from typing import Any

from megadyn.config.model import ModelConfig
from megadyn.errors import UserError
from megadyn.kinds import DENSE

TITLES = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
"""By `model_type`: as transformers writes it in the names of classes."""

CHOOSE_WINDOWS = ("qwen2", "qwen3", "smollm3")
"""Whose `use_sliding_window` says whether `sliding_window` counts."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "smollm3": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "default_theta": 2000000.0,
    },
}
"""What transformers takes for a key that config.json lacks, where that is not what we would take."""

DIFFERENCES = {
    "gpt2": "its positions are learned, and its norms are LayerNorm",
    "gpt_neox": "attention and feed-forward run in parallel, and its norms are LayerNorm",
    "phi": "attention and feed-forward run in parallel, and its norms are LayerNorm",
    "falcon": "attention and feed-forward run in parallel, and its norms are LayerNorm",
    "starcoder2": "its norms are LayerNorm, and its feed-forward has no gate",
    "stablelm": "its norms are LayerNorm, and only some dimensions of a head turn",
    "gemma": "it scales the embedding, and its feed-forward has GELU",
    "gemma2": "it scales the embedding, caps logits, and norms the outputs of attention and feed-forward",
    "gemma3": "it scales the embedding, and norms the outputs of attention and feed-forward",
    "gemma3_text": "it scales the embedding, and norms the outputs of attention and feed-forward",
    "olmo": "its norms have no weights",
    "olmo2": "it norms the outputs of attention and feed-forward, and queries and keys over their whole width",
    "olmo3": "it norms the outputs of attention and feed-forward, and queries and keys over their whole width",
    "phi3": "one tensor holds queries, keys and values, another gate and up",
    "granite": "it multiplies embedding, residuals, attention and logits by numbers of its own",
    "cohere": "attention and feed-forward run in parallel, and it scales logits",
    "cohere2": "attention and feed-forward run in parallel, and it scales logits",
    "llama4_text": "it is a mixture of experts",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "olmoe": "it is a mixture of experts",
    "gpt_oss": "it is a mixture of experts",
    "deepseek_v2": "it is a mixture of experts whose keys and values share a latent vector",
    "deepseek_v3": "it is a mixture of experts whose keys and values share a latent vector",
    "qwen3_next": "some of its layers have linear attention",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
}
"""By `model_type`: how it differs from every model here."""


def difference(model_type: object) -> str:
    """ " (gemma2: ...)", or nothing where we know nothing of the architecture."""
    known = DIFFERENCES.get(str(model_type))
    return f" ({model_type}: {known})" if known else ""


def blocks_of(config: dict[str, Any]) -> dict[str, Any]:
    """Which biases and norms attention has, and the cap of the logits, by a config.json of ours or of a dense architecture."""
    kind, bias = config["model_type"], bool(config.get("attention_bias"))
    if kind == "megadyn":
        return {
            "qkv_bias": bias,
            "output_bias": bool(config.get("attention_output_bias")),
            "qk_norm": bool(config.get("qk_norm")),
            "logit_softcap": config.get("final_logit_softcapping"),
        }
    has_choice = kind not in ("qwen2", "mistral")
    return {
        "qkv_bias": kind == "qwen2" or (has_choice and bias),
        "output_bias": has_choice and bias,
        "qk_norm": kind == "qwen3",
    }


def window_of(config: dict[str, Any]) -> tuple[int, list[int]] | None:
    """The sliding window of a config.json and the layers whose attention it limits; None if there are none.

    Raises:
        UserError: a list that is too short.
    """
    kind, layers = config["model_type"], config["num_hidden_layers"]
    window: int | None = config.get("sliding_window")
    if window is None or kind == "llama" or (kind in CHOOSE_WINDOWS and not config.get("use_sliding_window")):
        return None
    name = "sliding_layers" if kind == "megadyn" else "layer_types"
    given = None if kind == "mistral" else config.get(name)
    if given is not None and len(given) < layers:
        raise UserError(f"{name} in config.json: must have {layers} entries, one per layer, not {len(given)}")
    found = [layer for layer in range(layers) if _slides(config, kind, given, layer)]
    return (window, found) if found else None


def _slides(config: dict[str, Any], kind: str, given: list[Any] | None, layer: int) -> bool:
    if given is not None:
        return given[layer] in (1, "sliding_attention")
    if kind == "smollm3":  # its layers without rotary positions
        return not turns_of(config)[layer]
    return kind in ("megadyn", "mistral") or layer >= config["max_window_layers"]


def turns_of(config: dict[str, Any]) -> list[int]:
    """Per layer: 1 if its queries and keys turn to their positions, 0 if not. Raises UserError for a list that is too short."""
    layers = config["num_hidden_layers"]
    if config["model_type"] not in ("megadyn", "smollm3"):
        return [1] * layers
    turns: list[int] | None = config.get("no_rope_layers")
    if turns is None:
        every = 0 if config["model_type"] == "megadyn" else config["no_rope_layer_interval"]
        return [0 if every and (layer + 1) % every == 0 else 1 for layer in range(layers)]
    if len(turns) < layers:
        raise UserError(
            f"no_rope_layers in config.json: must have {layers} entries, one per layer, not {len(turns)}"
        )
    return turns[:layers]


def window_fields(model: ModelConfig, style: str) -> dict[str, Any]:
    """What the config.json of `style`, one of TITLES, says of a model's window."""
    if style == "llama":
        return {}
    if style == "mistral":
        return {"sliding_window": model.sliding_window}
    if model.sliding_window is None:
        return {"use_sliding_window": False}
    slides = [model.window_of(layer) is not None for layer in range(model.num_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": model.sliding_window,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }


def misfit(model: ModelConfig, style: str) -> str | None:
    """Why a model does not fit `style`, one of TITLES; None if it fits. A bias that it lacks can be zeros (`zero_biases`)."""
    title = TITLES[style]
    if model.routing.name != DENSE:
        return f"it is a {model.routing.name} model, and only a dense one fits"
    if model.normalization != "pre":
        return f"{title} has norms before attention and feed-forward alone, not model.normalization = {model.normalization}"
    if model.qk_norm != (style == "qwen3"):
        has = "norms" if style == "qwen3" else "has no norms on"
        return f"{title} {has} queries and keys, but model.qk_norm = {str(model.qk_norm).lower()}"
    if model.logit_softcap is not None:
        return f"{title} does not cap logits, but model.logit_softcap = {model.logit_softcap}"
    if model.rope.skip_layers and style != "smollm3":
        return f"{title} has rotary positions in every layer, but model.rope.skip_layers = {model.rope.skip_layers}"
    if style == "llama" and model.sliding_window is not None:
        return f"{title} has no sliding window, but model.sliding_window = {model.sliding_window}"
    if style == "mistral" and len(model.window_layers or ()) not in (0, model.num_layers):
        return f"{title} has a sliding window in every layer or none, but model.window_layers = {model.window_layers}"
    if style == "mistral" and (model.qkv_bias or model.output_bias):
        return f"{title} has no biases, but model.{'qkv' if model.qkv_bias else 'output'}_bias = true"
    if style == "qwen2" and model.output_bias:
        return f"{title} has no bias on the output of attention, but model.output_bias = true"
    if style == "llama" and model.hidden_size % model.num_heads:
        return (
            f"{title} needs a hidden size that its heads divide, but model.hidden_size = {model.hidden_size} and "
            f"model.num_heads = {model.num_heads}"
        )
    return None


def zero_biases(model: ModelConfig, style: str) -> tuple[str, ...]:
    """Projections of attention that have a bias in `style` and none in the model."""
    if style == "mistral":
        return ()
    has_output = style != "qwen2" and (model.qkv_bias or model.output_bias)
    has_qkv = style == "qwen2" or has_output
    return (
        *(("q_proj", "k_proj", "v_proj") if has_qkv and not model.qkv_bias else ()),
        *(("o_proj",) if has_output and not model.output_bias else ()),
    )
