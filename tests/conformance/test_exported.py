"""Every kind's export is the engine, runs without megadyn, and a run of it goes all the way to a report."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.checks import Case
from tests.conformance.exported import EXPORTED, a_run_goes_all_the_way, the_export_runs_alone


@pytest.mark.parametrize("promise", EXPORTED, ids=lambda check: check.__name__)
def test_exported(promise: Callable[[Case, Path], None], case: Case, tmp_path: Path) -> None:
    if promise is the_export_runs_alone and case.variant != "default":
        pytest.skip("tried with the kind's defaults: a variant ships the same code")
    promise(case, tmp_path / "export")


def test_a_run_goes_all_the_way(case: Case, tmp_path: Path) -> None:
    if case.variant != "default":
        pytest.skip("tried with the kind's defaults")
    a_run_goes_all_the_way(case, tmp_path)
