"""The layers of each kind of routing in an exported model. An export has a file of the same name for its own kind only."""

from typing import Any

from megadyn.errors import UserError
from megadyn.hf.configuration_megadyn import ExportedKind
from megadyn.kinds import find_kind, module_of


def exported_kind(routing: dict[str, Any]) -> ExportedKind:
    """Raises ValueError for an unknown kind."""
    try:
        kind = find_kind(routing.get("module", routing.get("kind", "")))
    except UserError as error:
        raise ValueError(str(error)) from None
    exported: ExportedKind = module_of(kind, "exported").EXPORTED
    return exported
