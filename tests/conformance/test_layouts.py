"""Every kind trains as on one process under every layout, and goes on at another one. Only what is selected is trained."""

import pytest

from tests.conformance.checks import Case
from tests.conformance.ranked import RESUMED, SAVED, STEPS, Curve, Layout, assert_like, train_all


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Curves of the cases that some selected test of this file needs."""
    params = [
        item.callspec.params
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    cases = {param["placed"][0] if "placed" in param else param["default_case"] for param in params}
    return train_all(sorted(cases, key=str), tmp_path_factory.mktemp("layouts"))


def test_training_is_that_of_one_process(placed: tuple[Case, Layout], trained: dict[str, Curve]) -> None:
    case, layout = placed
    found = trained[f"{case} {layout}"]
    if "refused" in found:
        pytest.skip(found["refused"])
    assert_like(found, trained[f"{case} {Layout(documents=layout.documents)}"])


@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_a_run_goes_on_at_another_layout(
    layout: Layout, default_case: Case, trained: dict[str, Curve]
) -> None:
    found = trained[f"{default_case} {layout} resumed"]
    if "refused" in found:
        pytest.skip(found["refused"])
    assert_like(found, trained[f"{default_case} {Layout()}"], range(SAVED, STEPS))


def test_the_comparison_can_fail() -> None:
    curve = {"loss": [5.0] * STEPS, "grad_norm": [1.0] * STEPS}
    with pytest.raises(AssertionError, match="loss"):
        assert_like(curve | {"loss": [5.001] * STEPS}, curve)
