"""Under recorded choices every layout computes what one process does, where choices of its own would lead it elsewhere."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from megadyn.routing.recording import Flips, flips
from tests.routing import replayed_long as long
from tests.routing.replayed import (
    DISTURBED,
    KEYS,
    LAYOUTS,
    ONE,
    STEPS,
    Curve,
    Layout,
    record_all,
    replay_all,
)

ROUNDING = 1e-5
"""Of scores in float32, behind four layers and a router whose terms nearly cancel, by the size of the layer's scores."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Curve]:
    return record_all(folder)


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Curve]) -> dict[str, Curve]:
    return replay_all(folder)


def farthest(found: Curve, wanted: Curve, steps: int = STEPS) -> float:
    """Largest relative difference of a loss or a gradient norm."""

    def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

    assert len(found["loss"]) == steps
    return max(apart(found[name], wanted[name]) for name in ("loss", "grad_norm"))


def moved(folder: Path, kind: str, run: str) -> Flips:
    return flips(folder / kind / "one", folder / kind / run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KEYS)
def test_a_replay_holds_every_layout_to_one_process(
    kind: str, layout: Layout, folder: Path, one: dict[str, Curve], two: dict[str, Curve]
) -> None:
    assert farthest(two[f"{kind} {layout}"], one[kind]) < 1e-5
    found = moved(folder, kind, str(layout))
    # its ties are of the first step, which others compute bit for bit
    if kind != "nested" or layout.tensor > 1:
        assert found.changed, "no layer would have chosen otherwise: the comparison shows nothing"
    assert found.farthest < ROUNDING


@pytest.mark.parametrize("kind", KEYS)
def test_without_a_replay_tokens_within_rounding_of_their_cut_change_places_and_curves_part(
    kind: str, folder: Path, one: dict[str, Curve], two: dict[str, Curve]
) -> None:
    assert farthest(two[f"{kind} alone"], one[kind]) > 1e-3
    found = moved(folder, kind, "alone")
    assert 0 < found.first.changed <= found.changed
    assert found.first.farthest < ROUNDING, "before the first flip both runs are the same but for rounding"


@pytest.mark.parametrize("kind", KEYS)
def test_a_replay_goes_by_its_file(kind: str, one: dict[str, Curve]) -> None:
    undisturbed, disturbed = one[f"{kind} one"], one[f"{kind} disturbed"]
    assert undisturbed["loss"] == one[kind]["loss"][:DISTURBED]
    assert disturbed["loss"][:-1] == undisturbed["loss"][:-1]
    assert abs(disturbed["loss"][-1] - undisturbed["loss"][-1]) > 1e-5


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Curve]]:
    folder = tmp_path_factory.mktemp("long")
    return folder, long.train_all(folder)


@pytest.mark.parametrize("layout", long.LAYOUTS, ids=str)
def test_layouts_stay_together_over_200_steps_of_the_quickstarts_model(
    layout: Layout, curves: tuple[Path, dict[str, Curve]]
) -> None:
    folder, found = curves
    assert found[str(ONE)]["loss"][-1] < found[str(ONE)]["loss"][0] - 0.5, "too little was learnt to compare"
    assert farthest(found[str(layout)], found[str(ONE)], long.STEPS) < 1e-5
    own = flips(folder / str(ONE), folder / str(layout))
    assert own.compared == long.STEPS * 4 * 4 * long.LENGTH
    assert own.farthest < ROUNDING
