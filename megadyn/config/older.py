"""Keys of earlier versions: read still, and converted to what they are called now."""

import math
from typing import Any

from megadyn.errors import ConfigError, UserError

OFFSET, LOG_OFFSET = "ce_offset_init", "ce_log_offset_init"
LEAST_OFFSET = 1e-10
"""Earlier versions took log(offset + 1e-10), so an offset of 0 was allowed and meant this one."""


def log_of_offset(offset: float) -> float:
    """`ce_log_offset_init` for an older `ce_offset_init` of at least 0."""
    return math.log(max(offset, LEAST_OFFSET))


def with_newer_keys(given: dict[str, Any], source: str) -> dict[str, Any]:
    """`given`, one file's or the command line's keys, with those of earlier versions converted.

    Raises:
        UserError: an older key beside the newer one, or a value that cannot be converted.
    """
    model = given.get("model", {})
    routing = model.get("routing", {}) if isinstance(model, dict) else {}
    if not isinstance(routing, dict) or OFFSET not in routing:
        return given
    if LOG_OFFSET in routing:
        raise UserError(f"model.routing.{OFFSET} in {source}: is the older spelling of model.routing.{LOG_OFFSET}, "
                        "which is given too; keep one of them")
    offset = routing[OFFSET]
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not 0 <= offset < math.inf:
        raise ConfigError(f"model.routing.{OFFSET}", offset, "a finite number of at least 0")
    newer = {key: value for key, value in routing.items() if key != OFFSET} | {LOG_OFFSET: log_of_offset(offset)}
    return given | {"model": model | {"routing": newer}}
