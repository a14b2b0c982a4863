"""Every kind's export is the engine, runs without megadyn, and a run of it goes all the way to a report."""

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.checks import Case
from tests.conformance.exported import (
    a_run_goes_all_the_way,
    run_alone,
    the_export_is_the_engine,
    the_export_runs_alone,
    write_export,
)


@pytest.fixture(scope="module")
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, tuple[Path, dict[str, Any]]]:
    """The export's folder of each case that a selected test runs alone, and what it gave there."""
    cases = {
        item.callspec.params["default_case"]
        for item in request.session.items
        if item.module is request.module and "alone" in getattr(item, "fixturenames", ())
    }
    folders = {case: tmp_path_factory.mktemp("alone") / str(case) for case in sorted(cases, key=str)}
    for case, folder in folders.items():
        write_export(case, folder)
    found = run_alone(folders)
    return {case: (folders[case], found[case]) for case in folders}


def test_the_export_is_the_engine(case: Case, tmp_path: Path) -> None:
    the_export_is_the_engine(case, tmp_path / "export")


def test_it_runs_alone(default_case: Case, alone: dict[Case, tuple[Path, dict[str, Any]]]) -> None:
    """Of the defaults alone: a variant ships the same code."""
    the_export_runs_alone(default_case, *alone[default_case])


def test_a_run_goes_all_the_way(default_case: Case, tmp_path: Path) -> None:
    a_run_goes_all_the_way(default_case, tmp_path)
