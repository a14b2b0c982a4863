"""Checkpoints of version 0.1, whose manifest has the routing state at its top and the keys of all kinds, still count."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megadyn.checkpoint.merge import routing_state, thresholds
from megadyn.checkpoint.save_load import check_same_run
from megadyn.errors import UserError
from tests.helpers.tiny import AS_SAVED, tiny_config

STATE = {"1": {"average": 0.25, "steps": 3}, "3": {"average": -1.5, "steps": 3}}
LOADS = {"1": {"share": 0.3, "steps": 3}}
OLD = {"thresholds": STATE, "loads": LOADS}


@pytest.mark.parametrize("manifest", [OLD, {"routing": OLD}], ids=["0.1", "now"])
def test_the_routing_state_is_found_in_both_places(manifest):
    manifest = manifest | {"model": {"routing": {"kind": "mod", "threshold_momentum": 0.9}}}
    assert routing_state(manifest, "loads") == LOADS
    assert routing_state(manifest, "others") == {}
    found = thresholds(manifest)
    assert {index: (threshold.average.item(), threshold.steps) for index, threshold in found.items()} == {
        1: (0.25, 3),
        3: (-1.5, 3),
    }
    same = {index: threshold.value for index, threshold in found.items()}
    assert {index: round(value.item(), 6) for index, value in same.items()} == {
        1: round(0.25 / (1 - 0.9**3), 6),
        3: round(-1.5 / (1 - 0.9**3), 6),
    }
    assert all(torch.isfinite(value) for value in same.values())


def old_manifest(kind: str) -> dict[str, object]:
    """As 0.1 wrote it: every key of every kind, those of other kinds at their defaults."""
    config = tiny_config(kind)
    model = asdict(config.model)
    model["routing"] = AS_SAVED | {"gate": "sigmoid"} | model["routing"]
    return {
        "model": model,
        "training": {key: getattr(config.training, key) for key in ("seed", "sequence_length")},
    }


@pytest.mark.parametrize("kind", ["dense", "dtf", "mod-bce", "dtrnet-expert"])
def test_a_run_of_0_1_may_be_resumed(kind):
    check_same_run(tiny_config(kind), old_manifest(kind), Path("old"))


def test_a_run_of_0_1_with_another_value_may_not():
    manifest = old_manifest("mod")
    manifest["model"]["routing"]["gate"] = "identity"
    with pytest.raises(UserError, match="gate"):
        check_same_run(tiny_config("mod"), manifest, Path("old"))
