"""What the config.json of published models says of their shape."""

import json
from pathlib import Path
from typing import Any


def qwen(layers: int, longest: int, vocabulary: int = 151936, tied: bool = True) -> dict[str, Any]:
    """What the Qwen2.5 models share. Their window is not used."""
    return {
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "max_position_embeddings": longest,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": longest,
        "use_sliding_window": False,
        "max_window_layers": layers,
    }


def sizes(hidden: int, heads: int, kv_heads: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": qwen(24, 32768) | sizes(896, 14, 2, 4864),
    "Qwen/Qwen2.5-1.5B": qwen(28, 131072) | sizes(1536, 12, 2, 8960),
    "Qwen/Qwen2.5-3B": qwen(36, 32768) | sizes(2048, 16, 2, 11008),
    "Qwen/Qwen2.5-7B": qwen(28, 131072, 152064, tied=False) | sizes(3584, 28, 4, 18944),
    "Qwen/Qwen3-4B": {
        **(qwen(36, 40960) | sizes(2560, 32, 8, 9728)),
        "model_type": "qwen3",
        "head_dim": 128,
        "attention_bias": False,
        "sliding_window": None,
        "rope_scaling": None,
    },
    "meta-llama/Llama-3.2-3B": {
        **sizes(3072, 24, 8, 8192),
        "model_type": "llama",
        "num_hidden_layers": 28,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rms_norm_eps": 1e-05,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "HuggingFaceTB/SmolLM2-360M": {
        **sizes(960, 15, 5, 2560),
        "model_type": "llama",
        "num_hidden_layers": 32,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rope_theta": 100000,
        "rope_scaling": None,
        "rms_norm_eps": 1e-05,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
}
"""As published, a tied head counted once."""


def write_models(folder: Path) -> None:
    """ORG/NAME/config.json in `folder`, without weights."""
    for name, config in CONFIGS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
