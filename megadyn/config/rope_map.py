"""Rotary positions, ours <-> `rope_parameters` of Hugging Face's config.json."""

import math
from typing import Any

from megadyn.config.model import ModelConfig
from megadyn.config.rope import NUMBERS, RopeConfig
from megadyn.errors import ConfigError, UserError

FIELDS = {
    "factor": "factor",
    "original_max_position": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
"""Ours: theirs."""
SILENT = {"rope_type", "type", "rope_theta"}
"""Read apart from the numbers."""
HARMLESS = {"partial_rotary_factor": (None, 1), "truncate": (None, True)}
"""Keys that may stand there with these values, under which they change nothing."""


def to_hf_rope(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of rotary positions. The original length of `dynamic` is max_position_embeddings itself."""
    rope = model.rope
    numbers = {FIELDS[name]: getattr(rope, name) for name in NUMBERS[rope.type]}
    longest = model.max_position
    if rope.type == "dynamic":
        longest = numbers.pop("original_max_position_embeddings")
    return {
        "max_position_embeddings": longest,
        "rope_parameters": {"rope_type": rope.type, "rope_theta": rope.theta, **numbers},
    }


def from_hf_rope(config: dict[str, Any], theta: float) -> RopeConfig:
    """The rotary positions of a config.json, in its present or an older form; `theta`: the base if it names none.

    Raises:
        UserError: a type or a number that we cannot express.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(name) or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in NUMBERS:
        raise UserError(f"rope_type {kind!r} in config.json: must be one of {', '.join(NUMBERS)}")
    numbers = {theirs: given[theirs] for theirs in given.keys() - SILENT if given[theirs] is not None}
    for key, allowed in HARMLESS.items():
        if (value := numbers.pop(key, None)) not in allowed:
            raise UserError(f"{name}.{key} = {value!r} in config.json: must be left out, or {allowed[1]!r}")
    if kind == "yarn":
        numbers |= _attention_factor(numbers)
    longest = config.get("max_position_embeddings")
    if kind == "dynamic":  # which transformers counts from the longest position, whatever else stands there
        numbers["original_max_position_embeddings"] = longest
    elif kind in ("llama3", "yarn"):
        original = config.get("original_max_position_embeddings")
        numbers["original_max_position_embeddings"] = original or numbers.get(
            "original_max_position_embeddings", longest
        )
    else:
        numbers.pop("original_max_position_embeddings", None)
    own = {FIELDS[ours]: ours for ours in NUMBERS[kind]}
    if foreign := sorted(numbers.keys() - own.keys()):
        raise UserError(
            f"{name}.{foreign[0]} = {numbers[foreign[0]]!r} in config.json: rope_type {kind!r} has no such number"
        )
    needed = (FIELDS[ours] for ours, default in NUMBERS[kind].items() if default is None)
    if missing := [key for key in needed if key not in numbers and key != "attention_factor"]:
        raise UserError(f"rope_type {kind!r} in config.json: {name} has no {missing[0]}")
    read: dict[str, Any] = {
        own[key]: int(value) if own[key] == "original_max_position" else float(value)
        for key, value in numbers.items()
    }
    rope = RopeConfig(
        type=kind,
        theta=float(given.get("rope_theta") or config.get("rope_theta") or theta),
        **read,
    )
    try:
        rope.check()
    except ConfigError as error:
        raise UserError(f"{name} in config.json: {error}") from None
    return rope


def _attention_factor(numbers: dict[str, Any]) -> dict[str, float]:
    """`attention_factor` of yarn where two multipliers of its logarithm stand in its place (DeepSeek's way); takes them out."""
    over, under = numbers.pop("mscale", None), numbers.pop("mscale_all_dim", None)
    if "attention_factor" in numbers or not over or not under:
        return {}
    log = math.log(max(numbers.get("factor") or 1, 1))
    return {"attention_factor": (0.1 * over * log + 1) / (0.1 * under * log + 1)}
