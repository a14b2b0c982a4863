"""Checks shared by several sections of the configuration. Each raises ConfigError, which names the key."""

import math
from collections.abc import Sequence

from megadyn.errors import ConfigError, did_you_mean


def one_of(key: str, got: str, allowed: Sequence[str]) -> None:
    if got not in allowed:
        raise ConfigError(key, got, f"one of {', '.join(allowed)}{did_you_mean(got, allowed)}")


def at_least(key: str, got: float | None, least: float) -> None:
    if got is not None and not least <= got < math.inf:
        raise ConfigError(
            key, got, f"a finite number of at least {least}" if got == math.inf else f"at least {least}"
        )


def in_range(key: str, got: float, low: float, high: float) -> None:
    """Refuses values outside (low, high]."""
    if not low < got <= high:
        raise ConfigError(key, got, f"in ({low}, {high}]")
