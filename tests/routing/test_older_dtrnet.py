"""Thresholds on p0, of checkpoints and exports older than those on the logit difference, are converted as they are read."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megadyn.config.config_map import to_hf_config
from megadyn.hf.reader import HfFolder
from megadyn.kinds import make_kind
from megadyn.kinds.older import lead_threshold, newer_manifest
from tests.helpers.oracle import oracle_logits
from tests.helpers.tiny import tiny_config
from tests.hf.tiny_models import random_tokens, tiny_model

NEW_KEYS = ("target_share", "aux_loss_lambda_limit")


@pytest.mark.parametrize("lead", [-80.0, -3.0, 0.0, 2.5, 12.0])
def test_a_converted_threshold_takes_the_same_tokens(lead: float) -> None:
    tau = lead_threshold(torch.tensor(lead).sigmoid().item())
    assert tau == pytest.approx(lead, abs=0.05)


@pytest.mark.parametrize("lead", [-120.0, 20.0])
def test_a_threshold_of_a_saturated_p0_stays_finite(lead: float) -> None:
    tau = lead_threshold(torch.tensor(lead).sigmoid().item())
    assert math.isfinite(tau)
    assert torch.tensor(tau).sigmoid().item() == torch.tensor(lead).sigmoid().item()


def older_routing(**fields: object) -> dict:
    routing = vars(make_kind(capacity=0.4, **fields))
    return {key: value for key, value in routing.items() if key not in NEW_KEYS}


def test_a_checkpoints_running_average_is_converted_once() -> None:
    share = 1 - 0.99**7
    manifest = {
        "model": {"routing": older_routing(kind="dtrnet", router_type="expert_choice")},
        "thresholds": {"1": {"average": 0.8 * share, "steps": 7}, "3": {"average": 0.0, "steps": 0}},
    }
    newer = newer_manifest(manifest)
    assert newer["thresholds"]["1"]["average"] / share == pytest.approx(math.log(4))
    assert newer["thresholds"]["3"] == {"average": 0.0, "steps": 0}
    assert {key: newer["model"]["routing"][key] for key in NEW_KEYS} == {
        key: getattr(make_kind("dtrnet"), key) for key in NEW_KEYS
    }, "or resuming would see another model"
    assert newer_manifest(newer)["thresholds"] == newer["thresholds"]


def test_thresholds_of_mod_stay() -> None:
    manifest = {
        "model": {"routing": older_routing(kind="mod")},
        "thresholds": {"1": {"average": 0.3, "steps": 7}},
    }
    assert newer_manifest(manifest)["thresholds"] == manifest["thresholds"]


def test_an_export_says_what_its_thresholds_are_of() -> None:
    expert, token = (
        to_hf_config(tiny_config(f"dtrnet-{kind}").model, "float32")["routing"]
        for kind in ("expert", "token")
    )
    assert (expert["score"], expert["causal"]) == ("logit", "threshold")
    assert "score" not in token


def older_export(folder: Path) -> None:
    """The tiny model saved in `folder`, and as one of an earlier version, its thresholds values of p0, in `older`."""
    model = tiny_model("dtrnet-expert")
    model.save_pretrained(folder)
    for layer in model.model.layers:
        if hasattr(layer, "causal_router"):
            layer.causal_router.threshold.sigmoid_()
    model.save_pretrained(folder / "older")
    config = json.loads((folder / "older/config.json").read_text())
    del config["routing"]["score"]
    (folder / "older/config.json").write_text(json.dumps(config))


def test_an_older_export_runs_and_is_read_as_it_was(tmp_path: Path) -> None:
    older_export(tmp_path)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        want, kept = (
            type(tiny_model()).from_pretrained(folder)(tokens).logits
            for folder in (tmp_path, tmp_path / "older")
        )
    torch.testing.assert_close(kept, want)
    for folder in (tmp_path, tmp_path / "older"):
        np.testing.assert_allclose(oracle_logits(folder, tokens.numpy()), want, atol=1e-4)
    name = "model.layers.0.causal_router.threshold"
    torch.testing.assert_close(
        HfFolder(tmp_path / "older").whole(name), HfFolder(tmp_path).whole(name), rtol=1e-4, atol=1e-5
    )
