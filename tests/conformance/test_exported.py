"""Every kind's export is the engine, runs without megadyn, and a run of it goes all the way to a report."""

from pathlib import Path

from tests.conformance.checks import Case
from tests.conformance.exported import a_run_goes_all_the_way, the_export_is_the_engine, the_export_runs_alone


def test_the_export_is_the_engine(case: Case, tmp_path: Path) -> None:
    the_export_is_the_engine(case, tmp_path / "export")


def test_it_runs_alone(default_case: Case, tmp_path: Path) -> None:
    """Of the defaults alone: a variant ships the same code."""
    the_export_runs_alone(default_case, tmp_path / "export")


def test_a_run_goes_all_the_way(default_case: Case, tmp_path: Path) -> None:
    a_run_goes_all_the_way(default_case, tmp_path)
