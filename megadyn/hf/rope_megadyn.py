"""Rotary positions of an exported model, whose `rope_parameters` are transformers' own. Stand-alone: shipped beside the weights,
imports nothing of megadyn.

    rope_type   which frequencies f of theta^(-2i/K) result, `factor` being how many times longer the context becomes
    default     as they are
    linear      f / factor
    dynamic     theta grows with the text, once that is longer than `max_position_embeddings`
    llama3      f / factor for pairs that turn fewer than `low_freq_factor` times in the original context, f for those that turn
                more than `high_freq_factor` times, and a mean of both between
    yarn        the same between `beta_slow` and `beta_fast` turns, the mean following the pair's number; cosines and sines are
                multiplied by `attention_factor`
"""

# Dims: B rows, C packed columns, K head size.

import math
from typing import Any, cast

import torch
from torch import Tensor

from .configuration_megadyn import MegadynConfig


def rotary_table(
    config: MegadynConfig, position_BC: Tensor, valid_BC: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, C, K] of rotary positions, computed in at least float32; `valid_BC`: which columns hold a token."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    rope, size = cast(dict[str, Any], config.rope_parameters), cast(int, config.head_dim)
    exponent = torch.arange(0, size, 2, device=position_BC.device).to(precision) / size
    if rope["rope_type"] == "dynamic":
        reach_B11 = position_BC.masked_fill(~valid_BC, 0).amax(1)[:, None, None].to(precision) + 1
        frequency = dynamic_frequency(config, rope, exponent, reach_B11)
    else:
        frequency = fixed_frequency(config, rope, exponent)
    angle = position_BC.to(precision)[..., None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    scale = attention_factor(rope)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotate(x_BCHK: Tensor, cos_BCK: Tensor, sin_BCK: Tensor) -> Tensor:
    """Dimension i turns with dimension i + K/2, Qwen2's convention."""
    first, second = x_BCHK.chunk(2, dim=-1)
    return x_BCHK * cos_BCK.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin_BCK.unsqueeze(2)


def original_length(config: MegadynConfig, rope: dict[str, Any]) -> int:
    """Longest sequence before the context was stretched."""
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def dynamic_frequency(
    config: MegadynConfig, rope: dict[str, Any], exponent: Tensor, reach_B11: Tensor
) -> Tensor:
    """[B, 1, K/2], for rows that reach so many positions."""
    size, original = cast(int, config.head_dim), config.max_position_embeddings
    stretch_B11 = rope["factor"] * reach_B11.clamp(min=original) / original - (rope["factor"] - 1)
    return 1.0 / (rope["rope_theta"] * stretch_B11 ** (size / (size - 2))) ** exponent


def fixed_frequency(config: MegadynConfig, rope: dict[str, Any], exponent: Tensor) -> Tensor:
    """[K/2]"""
    plain = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "default":
        return plain
    if rope["rope_type"] == "linear":
        return plain / rope["factor"]
    kept = (llama3_kept if rope["rope_type"] == "llama3" else yarn_kept)(config, rope, plain)
    return plain / rope["factor"] * (1 - kept) + plain * kept


def llama3_kept(config: MegadynConfig, rope: dict[str, Any], plain: Tensor) -> Tensor:
    """Share of each frequency that stays, [K/2]."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = original_length(config, rope) / (2 * math.pi / plain)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_kept(config: MegadynConfig, rope: dict[str, Any], plain: Tensor) -> Tensor:
    """Share of each frequency that stays, [K/2]."""
    size, original = cast(int, config.head_dim), original_length(config, rope)

    def pair(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first = max(math.floor(pair(rope.get("beta_fast") or 32)), 0)
    last = min(math.ceil(pair(rope.get("beta_slow") or 1)), size - 1)
    number = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    return 1 - ((number - first) / (last - first or 0.001)).clamp(0, 1)


def attention_factor(rope: dict[str, Any]) -> float:
    """What cosines and sines are multiplied by."""
    if rope["rope_type"] != "yarn":
        return 1.0
    given = rope.get("attention_factor")
    return 0.1 * math.log(max(rope["factor"], 1.0)) + 1 if given is None else given
