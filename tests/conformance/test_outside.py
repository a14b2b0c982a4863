"""A kind in a package outside the repository keeps every promise with no other file changed; and with one promise broken on
purpose it fails by the check that is meant for it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessException

from megadyn.kinds import find_kind
from tests.conformance.cases import cases_of
from tests.conformance.checks import (
    ALONE,
    Case,
    capacity_one_is_dense,
    choices_can_be_replayed,
    no_future,
    no_other_sample,
    recomputation_changes_nothing,
)
from tests.conformance.exported import (
    a_run_goes_all_the_way,
    run_alone,
    the_export_is_the_engine,
    the_export_runs_alone,
    write_export,
)
from tests.conformance.outside import BROKEN, write_package
from tests.conformance.ranked import LAYOUTS, RESUMED, SAVED, STEPS, Layout, assert_like, train_all

NAMES = {None: "whole_package", **{broken: f"broken_{broken}" for broken in BROKEN}}


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("packages")
    for broken, name in NAMES.items():
        write_package(folder, name, broken)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    find_kind.cache_clear()


def case_of(broken: str | None = None) -> Case:
    return cases_of(f"{NAMES[broken]}.kind")[0]


@pytest.mark.parametrize("promise", ALONE, ids=lambda check: check.__name__)
def test_it_keeps_its_promises_on_one_process(promise):
    assert promise(case_of()) is None


def test_its_export_is_the_engine(tmp_path):
    the_export_is_the_engine(case_of(), tmp_path / "export")


def test_its_export_runs_alone(tmp_path):
    case, folder = case_of(), tmp_path / "export"
    write_export(case, folder)
    the_export_runs_alone(case, folder, run_alone({case: folder})[case])


def test_a_run_of_it_goes_all_the_way(tmp_path):
    a_run_goes_all_the_way(case_of(), tmp_path)


@pytest.fixture(scope="module")
def trained(packages, tmp_path_factory):
    return train_all([case_of()], tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_trains_alike_under_every_layout(layout, trained):
    assert_like(
        trained[f"{case_of()} {layout}"], trained[f"{case_of()} {Layout(documents=layout.documents)}"]
    )


@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_it_goes_on_at_another_layout(layout, trained):
    assert_like(
        trained[f"{case_of()} {layout} resumed"], trained[f"{case_of()} {Layout()}"], range(SAVED, STEPS)
    )


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        ("future", no_future),
        ("other_samples", no_other_sample),
        ("chooses_anew", recomputation_changes_nothing),
        ("ignores_a_replay", choices_can_be_replayed),
    ],
)
def test_a_broken_promise_fails_by_its_own_check(broken, check):
    with pytest.raises(AssertionError):
        check(case_of(broken))
    for other in (no_future, no_other_sample, recomputation_changes_nothing, capacity_one_is_dense):
        if other is not check:
            other(case_of(broken))


def test_a_forgotten_tensor_sum_fails_by_the_layouts_alone(tmp_path):
    """Ranks come to hold different hidden states: curves differ, or ranks choose differently and cannot exchange tokens."""
    for check in (no_future, no_other_sample, recomputation_changes_nothing):
        check(case_of("no_tensor_sum"))
    with pytest.raises((AssertionError, ProcessException)):
        trains_alike_under_tensor_ranks(case_of("no_tensor_sum"), tmp_path)


def trains_alike_under_tensor_ranks(case: Case, folder: Path) -> None:
    found = train_all([case], folder)
    assert_like(found[f"{case} {Layout(tensor=2, recompute='full')}"], found[f"{case} {Layout()}"])
