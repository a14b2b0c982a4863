"""What is tried: every kind in the registry, or those named by --kind, each with its defaults, causal rules and variants."""

from megadyn.kinds import find_kind, keys_of
from tests.conformance.checks import Case


def cases_of(kind: str) -> list[Case]:
    """The kind with its defaults, with each other causal rule, and in each variant that its record names."""
    found = find_kind(kind)
    cases = [Case(kind, "default", ())]
    if "causal" in keys_of(found):
        cases += [Case(kind, rule, (("causal", rule),)) for rule in found.rules[1:]]
    return cases + [Case(kind, name, tuple(keys.items())) for name, keys in found.variants.items()]
