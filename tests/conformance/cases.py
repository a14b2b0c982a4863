"""What is tried: every kind in the registry, or those named by --kind, each with its defaults, causal rules and variants."""

from megadyn.kinds import settings_of
from tests.conformance.checks import Case


def cases_of(kind: str) -> list[Case]:
    return [Case(kind, name, tuple(keys.items())) for name, keys in settings_of(kind).items()]
