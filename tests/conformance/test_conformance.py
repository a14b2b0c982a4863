"""Every kind of routing keeps every promise: `pytest tests/conformance`, or of a package of your own with
`--kind my_package.my_kind`. A promise that does not apply is skipped with the reason."""

from collections.abc import Callable

import pytest

from tests.conformance.checks import ALONE, Case, memory_is_as_planned


@pytest.mark.parametrize("promise", ALONE, ids=lambda check: check.__name__)
def test_on_one_process(promise: Callable[[Case], str | None], case: Case) -> None:
    if reason := promise(case):
        pytest.skip(reason)


def test_memory(default_case: Case) -> None:
    """Of the defaults alone: it takes seconds, and a variant adds few tensors."""
    memory_is_as_planned(default_case)
