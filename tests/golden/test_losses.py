"""Training gives the losses that it has always given: ten steps of the tiny model of each kind.

`losses.json` was made by `python -m tests.golden.make` on the machine that it names. There (same torch, same vector
instructions) every bit must agree. Elsewhere sums are taken in another order, and losses agree to 1e-6 of their size.
"""

import json

import pytest

from megadyn.kinds import known_kinds
from tests.golden.make import LOSSES, losses, machine
from tests.helpers.tiny import KINDS, VARIANTS

GOLDEN = json.loads(LOSSES.read_text())


def test_there_are_losses_of_every_kind():
    tried = KINDS | VARIANTS
    assert set(GOLDEN["losses"]) >= set(KINDS)
    assert {tried[name]["kind"] for name in GOLDEN["losses"]} == set(known_kinds())
    assert all(len(set(curve)) == 10 for curve in GOLDEN["losses"].values())


@pytest.mark.parametrize("kind", GOLDEN["losses"])
def test_losses_are_what_they_were(kind):
    golden = [float.fromhex(loss) for loss in GOLDEN["losses"][kind]]
    now = losses(kind)
    assert now == (golden if GOLDEN["made_on"] == machine() else pytest.approx(golden, rel=1e-6, abs=0))
