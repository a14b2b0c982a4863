"""Which layers a kind of routing brings to an exported model. An export carries a file of this name for its own kind alone."""

from typing import Any

from megadyn.errors import UserError
from megadyn.hf.configuration_megadyn import ExportedKind
from megadyn.kinds import find_kind, module_of


def exported_kind(routing: dict[str, Any]) -> ExportedKind:
    """ValueError for a kind that does not exist here."""
    try:
        kind = find_kind(routing.get("module", routing.get("kind", "")))
    except UserError as error:
        raise ValueError(str(error)) from None
    exported: ExportedKind = module_of(kind, "exported").EXPORTED
    return exported
