"""Gives each test that asks for a `case` those of the kinds that are tried, and for a `default_case` one of each kind."""

import gc
from collections.abc import Iterator

import pytest

from megadyn.kinds import known_kinds
from tests.conformance.cases import cases_of
from tests.conformance.ranked import layouts_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = metafunc.config.getoption("--kind") or known_kinds()
    cases = [case for kind in kinds for case in cases_of(kind)]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=str)
    if "default_case" in metafunc.fixturenames:
        metafunc.parametrize("default_case", [case for case in cases if case.variant == "default"], ids=str)
    if "placed" in metafunc.fixturenames:
        placed = [(case, layout) for case in cases for layout in layouts_of(case)]
        metafunc.parametrize("placed", placed, ids=[f"{case}-{layout}" for case, layout in placed])


@pytest.fixture(scope="session", autouse=True)
def _settled() -> Iterator[None]:
    """What stands in memory before need not be searched for tensors again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
