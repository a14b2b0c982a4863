"""Training gives the losses that it has always given: ten steps of the tiny model of each kind.

`losses.json` was made by `python -m tests.golden.make` with AVX2 instructions. Where the CPU has these and torch is the same,
every bit must agree. Elsewhere sums are taken in another order, and losses agree to 1e-6 of their size.
"""

import json

import pytest

from megadyn.kinds import known_kinds
from tests.golden.make import LOSSES, made_now
from tests.helpers.tiny import KINDS, VARIANTS

GOLDEN = json.loads(LOSSES.read_text())


def test_there_are_losses_of_every_kind():
    tried = KINDS | VARIANTS
    assert set(GOLDEN["losses"]) >= set(KINDS)
    assert {tried[name]["kind"] for name in GOLDEN["losses"]} == set(known_kinds())
    assert all(len(set(curve)) == 10 for curve in GOLDEN["losses"].values())


@pytest.fixture(scope="module")
def now():
    return made_now(GOLDEN["losses"])


@pytest.mark.parametrize("kind", GOLDEN["losses"])
def test_losses_are_what_they_were(kind, now):
    golden, found = ([float.fromhex(loss) for loss in of["losses"][kind]] for of in (GOLDEN, now))
    assert found == (
        golden if GOLDEN["made_on"] == now["made_on"] else pytest.approx(golden, rel=1e-6, abs=0)
    )
