"""Counts as people write them: 3000000000, 3e9, 3B, 1.5T."""

import re
from decimal import Decimal
from typing import Any

from megadyn.errors import ConfigError

COUNTED = (
    "training.tokens",
    "training.samples",
    "optimizer.schedule_tokens",
    "optimizer.warmup_tokens",
    "optimizer.decay_tokens",
)
"""Keys whose values are written so."""
UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}
"""Powers of ten for the letter after a number, in upper or lower case."""
COUNT = re.compile(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)(e[+]?\d{1,3})?\s*([kmbt]?)", re.IGNORECASE)


def count(key: str, given: Any) -> int:
    """An integer from `given`: a number such as 3e9, or a string such as `300B`, `2M` or `1.5T`.

    Raises:
        ConfigError: not a number, or not an integer. The caller must check its range.
    """
    number = _number(given)
    if number is None or number != int(number):
        raise ConfigError(
            key,
            given,
            "a whole number, which may be written as 3000000000, 3e9, 3B or 1.5T "
            "(K, M, B and T are thousands, millions, billions and trillions)",
        )
    return int(number)


def _number(given: Any) -> Decimal | None:
    if isinstance(given, bool):
        return None
    if isinstance(given, int | float):
        number = Decimal(repr(given))
        return number if number.is_finite() else None
    found = COUNT.fullmatch(given.strip()) if isinstance(given, str) else None
    if not found:
        return None
    digits = found[1].replace("_", "").replace(",", "")
    return Decimal(digits + (found[2] or "")).scaleb(UNITS[found[3].lower()])
