"""A run saved on four ranks goes on alike under every other layout, and one saved there on those four."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_on_ranks
from tests.parity.curves import Case
from tests.parity.test_resume import SAVED, STEPS, train

HOME = (2, 2, 1)
"""tensor, pipeline, data."""

ELSEWHERE = [
    Case("dtf", 1, 1, 1),
    Case("mod", 1, 4, 1),
    Case("dtrnet-token", 4, 1, 1, tied=True),
    Case("dense", 2, 1, 2, zero=2),
    Case("dtrnet-token", 1, 1, 4, zero=3),
]
"""Each kind, also with tied embeddings; the vocabulary of 61 is padded wherever it is cut. Saved under ZeRO 1."""


def at_home(case: Case) -> Case:
    return case._replace(tensor=HOME[0], pipeline=HOME[1], data=HOME[2], zero=1)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Of the steps after saving: `straight` on, `away` from home, and `back` home from elsewhere."""
    folder = tmp_path_factory.mktemp("topologies")
    found: dict[str, list[float]] = {}
    alone = [case for case in ELSEWHERE if case.world == 1]
    for world, cases, what in (
        (4, ELSEWHERE, "home"),
        (1, alone, "away"),
        (4, [c for c in ELSEWHERE if c.world == 4], "away"),
        (4, ELSEWHERE, "back"),
    ):
        run_on_ranks(_run, world, cases, what, str(folder))
        found |= json.loads((folder / f"{what}.json").read_text())
    return found


def _run(cases: list[Case], what: str, folder: str) -> None:
    from megadyn.launch import launch

    launch.join()
    home, there = Path(folder) / "home", Path(folder) / "there"
    found = {}
    for case in cases:
        if what == "home":
            found[f"{case} straight"] = train(at_home(case), range(STEPS), save_to=home / str(case)).losses[
                SAVED:
            ]
        if what == "away":
            found[f"{case} away"] = train(case, range(SAVED, STEPS), load_from=home / str(case)).losses
            train(case, range(SAVED), save_to=there / str(case))
        if what == "back":
            found[f"{case} back"] = train(
                at_home(case), range(SAVED, STEPS), load_from=there / str(case)
            ).losses
    if dist.get_rank() == 0:
        (Path(folder) / f"{what}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("where", ["away", "back"])
@pytest.mark.parametrize("case", ELSEWHERE, ids=str)
def test_the_loss_goes_on_alike(case: Case, where: str, losses: dict[str, list[float]]) -> None:
    found, straight = losses[f"{case} {where}"], losses[f"{case} straight"]
    assert len(found) == STEPS - SAVED
    torch.testing.assert_close(torch.tensor(found), torch.tensor(straight), rtol=1e-5, atol=0)
