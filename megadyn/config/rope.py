"""The `model.rope` section: which angle turns a pair of dimensions per position, and how longer contexts stretch it."""

import math
from dataclasses import dataclass, field
from typing import Any

from megadyn.checks import at_least, in_range, one_of
from megadyn.errors import ConfigError, UserError

NUMBERS: dict[str, dict[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "dynamic": {"factor": None, "original_max_position": None},
    "llama3": {
        "factor": None,
        "original_max_position": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {
        "factor": None,
        "original_max_position": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
    },
}
"""By type: the numbers that it has, with their defaults. None: must be given, but for `attention_factor`, which follows from
`factor`."""


@dataclass
class RopeConfig:
    type: str = "default"
    """`default`, or one of the ways to stretch a model to longer contexts: `linear` (arXiv 2306.15595), `dynamic` (NTK: the base
    grows with the sequence), `llama3` (Llama 3.1), `yarn` (arXiv 2309.00071). The numbers below belong to these."""
    theta: float = 10000.0
    """Base of the rotary positions' wavelengths. Larger for longer sequences; Qwen2.5 has 1e6. `model.rope_theta` is its older
    name."""
    factor: float | None = None
    """How many times longer the context becomes; needed by every type but `default`."""
    original_max_position: int | None = None
    """Of `dynamic`, `llama3` and `yarn`: longest sequence before the context was stretched."""
    low_freq_factor: float | None = None
    """Of `llama3`: dimensions that turn fewer times than this over the original context are divided by
    `factor`. 1 when left out."""
    high_freq_factor: float | None = None
    """Of `llama3`: dimensions that turn more often than this in the original context stay as they are. 4 when left out."""
    beta_fast: float | None = None
    """Of `yarn`: dimensions that turn more often than this in the original context stay as they are. 32 when left out."""
    beta_slow: float | None = None
    """Of `yarn`: dimensions that turn fewer times than this in the original context are divided by `factor`. 1 when left out."""
    attention_factor: float | None = None
    """Of `yarn`: what scales queries and keys; 0.1 ln(`factor`) + 1 when left out."""
    skip_layers: list[int] = field(default_factory=list)
    """Layers, counted from 0, whose attention has no rotary positions, as in SmolLM3."""

    def check(self) -> None:
        one_of("model.rope.type", self.type, tuple(NUMBERS))
        in_range("model.rope.theta", self.theta, 1, math.inf)
        own = NUMBERS[self.type]
        for name in {key: None for numbers in NUMBERS.values() for key in numbers}:
            value = getattr(self, name)
            if name not in own and value is not None:
                raise ConfigError(
                    f"model.rope.{name}",
                    value,
                    f"null with model.rope.type = {self.type}, which has no such number",
                )
            if name in own and value is None:
                setattr(self, name, self._left_out(name))
        if self.factor is not None:
            at_least("model.rope.factor", self.factor, 1)
        at_least("model.rope.original_max_position", self.original_max_position, 1)
        if self.attention_factor is not None:
            in_range("model.rope.attention_factor", self.attention_factor, 0, math.inf)
        self._check_order("low_freq_factor", "high_freq_factor")
        self._check_order("beta_slow", "beta_fast")

    def _left_out(self, name: str) -> float:
        if name == "attention_factor":
            assert self.factor is not None
            return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        default = NUMBERS[self.type][name]
        if default is None:
            raise ConfigError(f"model.rope.{name}", None, f"given with model.rope.type = {self.type}")
        return default

    def _check_order(self, low: str, high: str) -> None:
        least, most = getattr(self, low), getattr(self, high)
        if least is not None:
            in_range(f"model.rope.{low}", least, 0, math.inf)
            if not least < most < math.inf:
                raise ConfigError(
                    f"model.rope.{high}", most, f"a finite number above model.rope.{low} = {least}"
                )


OLDER = "rope_theta"
"""What `model.rope.theta` was called before it had a section."""


def with_rope_section(given: dict[str, Any], source: str) -> dict[str, Any]:
    """`given`, one file's or the command line's keys, with `model.rope_theta` as `model.rope.theta`.

    Raises:
        UserError: both are given.
    """
    model = given.get("model", {})
    if not isinstance(model, dict) or OLDER not in model:
        return given
    rope = model.get("rope", {})
    if not isinstance(rope, dict):
        return given  # refused with the section's keys
    if "theta" in rope:
        raise UserError(
            f"model.{OLDER} in {source}: is the older spelling of model.rope.theta, which is given too; keep one of them"
        )
    rest = {key: value for key, value in model.items() if key != OLDER}
    return given | {"model": rest | {"rope": rope | {"theta": model[OLDER]}}}
