"""Finds the kind of routing that a configuration asks for, and checks that `model.routing` has only keys of that kind."""

from collections.abc import Sequence
from typing import Any

from megadyn.errors import ConfigError, UserError
from megadyn.kinds import DENSE, Kind, find_kind, keys_of, other_kinds_key

FLAT = frozenset(
    (
        "capacity",
        "layout",
        "causal",
        "threshold_momentum",
        "predictor_loss_weight",
        "ma_window",
        "prior_factor",
        "prior_loss_weight",
        "gate",
        "bce_loss_weight",
        "z_loss_weight",
        "router_type",
        "aux_loss_lambda",
        "aux_loss_warmup",
        "safe_min_attn_ratio",
        "jitter",
        "entropy_bonus",
    )
)
"""Up to version 0.1 every `config.yaml` in an output folder contained these keys, for any kind."""


def settle_kind(layers: Sequence[tuple[Any, Any]]) -> type[Kind]:
    """The kind that `layers` ask for. `layers` are (source, content); later ones win.

    If a later layer chooses another kind, the keys that earlier layers set for the previous kind are removed from their
    contents.

    Raises:
        ConfigError: for a key that the kind does not have, in the layer that chose the kind or in a later one.
    """
    sections = [(source, _routing_of(content, source)) for source, content in layers]
    name, since = DENSE, 0
    for place, (_, routing) in enumerate(sections):
        if routing.get("kind", name) != name:
            name, since = routing["kind"], place
    if not isinstance(name, str):
        raise ConfigError("model.routing.kind", name, "the name of a kind")
    kind = find_kind(name)
    for place, (_, routing) in enumerate(sections):
        foreign = [key for key in routing if key not in keys_of(kind)]
        if foreign and place >= since and not routing.keys() >= FLAT:
            raise UserError(f"model.routing.{foreign[0]}: {other_kinds_key(name, foreign[0])}")
        for key in foreign:
            del routing[key]
    return kind


def _routing_of(content: Any, source: Any) -> dict[str, Any]:
    """`model.routing` in a file's content; empty if it is not given. Returns the same object, so that keys can be removed."""
    model = content.get("model", {}) if isinstance(content, dict) else {}
    routing = model.get("routing", {}) if isinstance(model, dict) else {}
    if not isinstance(routing, dict):
        raise UserError(f"model.routing: must hold keys (kind, ...), is {routing!r} in {source}")
    return routing
