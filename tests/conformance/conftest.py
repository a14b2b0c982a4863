"""Gives each test that asks for a `case` those of the kinds that are tried."""

import gc
from collections.abc import Iterator

import pytest

from megadyn.kinds import known_kinds
from tests.conformance.cases import cases_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        kinds = metafunc.config.getoption("--kind") or known_kinds()
        metafunc.parametrize("case", [case for kind in kinds for case in cases_of(kind)], ids=str)


@pytest.fixture(scope="session", autouse=True)
def _settled() -> Iterator[None]:
    """What stands in memory before need not be searched for tensors again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
