"""Checkpoints of a DTF that learnt the offset itself and ranked by G, as earlier versions wrote them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from megadyn.checkpoint import layout
from megadyn.checkpoint.export import whole_tensors
from megadyn.checkpoint.merge import ShardedTensors, routing_state
from megadyn.config import load_config
from megadyn.errors import UserError
from megadyn.kinds.older import CERTAIN, score_threshold
from megadyn.routing.surprise import gate_of

LOG_OFFSET = "model.layers.0.router.ce_log_offset"
OFFSET = "model.layers.0.router.ce_offset"


def in_older_form(checkpoint: Path, offset: float | None = None) -> None:
    """Rewrites it as an earlier version would have written it; `offset` in place of its own."""
    manifest: dict[str, Any] = json.loads((checkpoint / layout.MANIFEST).read_text())
    parts = {path: load_file(path) for path in checkpoint.glob("*.safetensors")}
    merged: dict[str, Tensor] = {name: tensor for part in parts.values() for name, tensor in part.items()}
    own = merged[LOG_OFFSET].double().exp() if offset is None else torch.tensor([offset], dtype=torch.float64)
    older = {
        LOG_OFFSET: (OFFSET, own),
        f"{LOG_OFFSET}/exp_avg": (f"{OFFSET}/exp_avg", merged[f"{LOG_OFFSET}/exp_avg"] / own),
        f"{LOG_OFFSET}/exp_avg_sq": (f"{OFFSET}/exp_avg_sq", merged[f"{LOG_OFFSET}/exp_avg_sq"] / own**2),
    }
    for path, part in parts.items():
        for name in older.keys() & part.keys():
            del part[name]
            part[older[name][0]] = older[name][1].float()
        save_file(part, path)
        manifest["files"][path.name] = layout.file_digest(path)
    routing = manifest["model"]["routing"]
    routing["ce_offset_init"] = math.exp(routing.pop("ce_log_offset_init"))
    manifest["thresholds"] = manifest.pop("routing")["thresholds"]  # where they stood then
    for state in manifest["thresholds"].values():
        share = 1 - routing["threshold_momentum"] ** state["steps"]
        state["average"] = -math.expm1(-state["average"] / share) * share
    config = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(
        "".join(
            f"    ce_offset_init: {routing['ce_offset_init']}\n" if "ce_log_offset_init" in line else line
            for line in config.splitlines(keepends=True)
        )
    )
    manifest["files"]["config.yaml"] = layout.file_digest(checkpoint / "config.yaml")
    layout.write_manifest(checkpoint, manifest)


@pytest.fixture
def both(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the same as an earlier version wrote it."""
    newest = layout.resolve(saved)
    older = tmp_path / "checkpoints" / newest.name
    shutil.copytree(newest, older)
    in_older_form(older)
    return newest, older


def test_weights_moments_thresholds_and_configuration_are_converted(both: tuple[Path, Path]) -> None:
    newest, older = both
    for kind in ("weights", "optimizer"):
        wanted, found = (ShardedTensors(folder, kind) for folder in (newest, older))
        assert found.names() == wanted.names()
        for name in found.names():
            assert_close(
                found.whole(name), wanted.whole(name), rtol=1e-5, atol=1e-7 if kind == "weights" else 0
            )
    wanted, found = (layout.read_manifest(folder) for folder in (newest, older))
    states, wanted_states = (routing_state(manifest, "thresholds") for manifest in (found, wanted))
    assert states.keys() == wanted_states.keys()
    for layer, state in states.items():
        assert state == pytest.approx(wanted_states[layer], rel=1e-6)
    assert found["model"]["routing"] == pytest.approx(wanted["model"]["routing"])
    assert (
        load_config(older / "config.yaml").model.routing.ce_log_offset_init
        == found["model"]["routing"]["ce_log_offset_init"]
    )
    assert layout.damage(older, sorted(found["files"])) is None
    for (name, mine), (other, reference) in zip(
        whole_tensors(older, torch.float32), whole_tensors(newest, torch.float32), strict=True
    ):
        assert name == other
        assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_an_offset_without_a_logarithm_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / layout.resolve(saved).name
    shutil.copytree(layout.resolve(saved), folder)
    in_older_form(folder, offset=-0.003)
    with pytest.raises(
        UserError, match=r"router\.ce_offset is -0\.003, which has no logarithm.*earlier checkpoint"
    ) as caught:
        ShardedTensors(folder, "weights").whole(LOG_OFFSET)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tau", [0.0, 1e-6, 0.5, 0.999])
def test_a_converted_threshold_takes_the_same_tokens(tau: float) -> None:
    score = torch.linspace(0, 8, 4001, dtype=torch.float64)
    assert torch.equal(score >= score_threshold(tau), gate_of(score) >= tau) or tau == 0


@pytest.mark.parametrize("tau", [1.0, 1.0000001])
def test_a_threshold_of_one_takes_the_tokens_whose_gate_rounds_to_one(tau: float) -> None:
    score = torch.tensor([17.0, 17.3, 17.4, 80.0])
    assert score_threshold(tau) == CERTAIN
    assert (
        (score >= CERTAIN).tolist()
        == (1 - (-score.double()).exp()).float().eq(1).tolist()
        == [False, False, True, True]
    )
