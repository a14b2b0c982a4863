"""Converts DTF and DTRNet models saved by earlier versions when they are read.

In DTF, the parameter was the offset itself (`router.ce_offset`), used as log(offset + 1e-10). Tokens were ranked by G,
so thresholds were values of G. Now the parameter is its logarithm, and the score is r = -log(1 - G). DTRNet's expert
choice ranked by p0; now its score is the logit difference.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megadyn.errors import ConfigError, UserError
from megadyn.kinds.dtf import Dtf
from megadyn.kinds.dtrnet import Dtrnet

if TYPE_CHECKING:  # manifests must be readable without torch
    from torch import Tensor

OFFSET, LOG_OFFSET = "ce_offset_init", "ce_log_offset_init"
LEAST_OFFSET = 1e-10
"""Earlier versions used log(offset + 1e-10), so an offset of 0 was allowed and meant this value."""
OLDER, NEWER = "router.ce_offset", "router.ce_log_offset"
ADDED = 1e-10
"""Added to the offset inside the logarithm by the older forward pass."""
CERTAIN = 25 * math.log(2)
"""The r from which on float32's G is 1 (1 - G < 2^-25), and the logit difference from which on p0 is 1. A threshold of
1 took the tokens beyond it."""
IMPOSSIBLE = -150 * math.log(2)
"""The logit difference below which float32's p0 is 0."""


def log_of_offset(offset: float) -> float:
    """Converts an older `ce_offset_init` (at least 0) to `ce_log_offset_init`."""
    return math.log(max(offset, LEAST_OFFSET))


def with_newer_keys(given: dict[str, Any], source: str) -> dict[str, Any]:
    """`given`, the keys of one file or of the command line, with keys of earlier versions converted.

    Raises:
        UserError: an older key and its newer one are both given, or a value cannot be converted.
    """
    model = given.get("model", {})
    routing = model.get("routing", {}) if isinstance(model, dict) else {}
    if not isinstance(routing, dict) or OFFSET not in routing:
        return given
    if LOG_OFFSET in routing:
        raise UserError(
            f"model.routing.{OFFSET} in {source}: this is the older spelling of model.routing.{LOG_OFFSET}, "
            "which is also given; keep one of them"
        )
    offset = routing[OFFSET]
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not 0 <= offset < math.inf:
        raise ConfigError(f"model.routing.{OFFSET}", offset, "a finite number of at least 0")
    newer = {key: value for key, value in routing.items() if key != OFFSET} | {
        LOG_OFFSET: log_of_offset(offset)
    }
    return given | {"model": model | {"routing": newer}}


def newer_name(name: str) -> str:
    """A tensor's current name. Optimizer states are called NAME/STATE."""
    parameter, slash, state = name.partition("/")
    return parameter.removesuffix(OLDER) + NEWER + slash + state if parameter.endswith(OLDER) else name


def older_name(name: str) -> str:
    """A tensor's name in versions whose parameter was the offset itself."""
    parameter, slash, state = name.partition("/")
    return parameter.removesuffix(NEWER) + OLDER + slash + state if parameter.endswith(NEWER) else name


def log_offset(offset: "Tensor", name: str) -> "Tensor":
    """The newer parameter that is equivalent to the older one.

    Raises UserError for an offset below 0: the older model's scores are NaN, so there is nothing to convert.
    """
    inside = offset.double() + ADDED
    if not (inside > 0).all():
        raise UserError(
            f"{name} is {offset.min().item():.3g}, which has no logarithm: the saved model gives NaN; "
            "take an earlier checkpoint of its run"
        )
    return inside.log().float()


def moment(state: str, value: "Tensor", offset: "Tensor") -> "Tensor":
    """Adam's moment of the newer parameter, by the chain rule: d/d(log o) = o d/do; the second moment uses its square.

    This is better than resetting it: Adam shares its step count between all parameters, so zeros would cause a large first step.
    """
    factor = offset.double() + ADDED
    if state == "exp_avg_sq":
        factor = factor.square()
    return (value.double() * factor).float()


def score_threshold(tau: float) -> float:
    """Converts a threshold on G to one on r. From 1 on it took the tokens whose G rounds to 1, and it still does."""
    return -math.log1p(-tau) if tau < 1 else CERTAIN


def lead_threshold(tau: float) -> float:
    """Converts a threshold on p0 to one on the logit difference."""
    if tau >= 1:
        return CERTAIN
    return math.log(tau / (1 - tau)) if tau > 0 else IMPOSSIBLE


def newer_threshold_of(routing: dict[str, Any]) -> Callable[[float], float] | None:
    """The conversion of an older export's thresholds, given its `routing`; None if they need none."""
    for kind, converted in ((Dtf, score_threshold), (Dtrnet, lead_threshold)):
        if routing.get("kind") == kind.name and routing.get("score") != kind.scores[-1]:
            return converted
    return None


def newer_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's manifest with the model section and thresholds of an older DTF or DTRNet converted."""
    model = manifest["model"]
    routing = model.get("routing", {})
    converted = None  # the conversion of its thresholds
    if routing.get("kind") == Dtf.name and OFFSET in routing:
        converted = score_threshold
    if routing.get("kind") == Dtrnet.name and NEWER_KEYS.keys() - routing.keys():
        converted = lead_threshold
        routing = NEWER_KEYS | routing
    if OFFSET in routing:
        routing[LOG_OFFSET] = log_of_offset(routing.pop(OFFSET))
    manifest = manifest | {"model": model | {"routing": routing}}
    if converted is not None and "thresholds" in manifest:
        momentum = routing["threshold_momentum"]
        manifest["thresholds"] = {
            layer: _newer_average(state, momentum, converted)
            for layer, state in manifest["thresholds"].items()
        }
    return manifest


NEWER_KEYS = {"target_share": None, "aux_loss_lambda_limit": Dtrnet.aux_loss_lambda_limit}
"""Keys of model.routing that are missing in manifests older than DTRNet's thresholds on logit differences."""


def _newer_average(
    state: dict[str, float], momentum: float, converted: Callable[[float], float]
) -> dict[str, float]:
    """The running average that gives the converted threshold after the same number of steps."""
    if not state["steps"]:
        return state
    share = 1 - momentum ** state["steps"]
    return state | {"average": converted(state["average"] / share) * share}
