"""What a resumed run may change, and what then becomes of the state that depended on it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megadyn.checkpoint.same_run import (
    MUST_EQUAL,
    SAME_TRAINING,
    begins_data,
    changes,
    changes_line,
    check_same_run,
)
from megadyn.checkpoint.save_load import threshold_state
from megadyn.config import Config, save_config
from megadyn.errors import UserError
from megadyn.routing.tracker import RunningThreshold
from tests.helpers.tiny import tiny_config


def manifest_of(config: Config) -> dict[str, Any]:
    return {
        "model": asdict(config.model),
        "training": {key: getattr(config.training, key) for key in SAME_TRAINING},
    }


def changed(kind: str, **changes: Any) -> tuple[Config, Config]:
    """A configuration, and the same with dotted keys changed."""
    before, now = tiny_config(kind), tiny_config(kind)
    for key, value in changes.items():
        section: Any = now
        *path, name = key.split("__")
        for part in path:
            section = getattr(section, part)
        setattr(section, name, value)
    return before, now


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dtf", {"model__routing__prior_loss_weight": 0.5}),
        ("dtf", {"model__routing__threshold_momentum": 0.9}),
        ("dtf", {"model__routing__capacity": 0.25}),
        ("dtf", {"model__routing__causal": "predictor"}),
        ("dtf", {"model__routing__ma_window": 9}),
        ("mod", {"model__routing__z_loss_weight": 0.1}),
        ("mod", {"model__routing__causal": "bce"}),
        ("dtrnet-token", {"model__routing__aux_loss_lambda": 0.01}),
        ("dtrnet-token", {"model__routing__safe_min_attn_ratio": 0.1}),
        ("dtrnet-expert", {"model__routing__layout": "T1DDD"}),
        ("dense", {"model__rope__theta": 5e5}),
        ("dense", {"model__norm_eps": 1e-5}),
        ("dense", {"model__max_position": 99}),
        ("dense", {"optimizer__learning_rate": 1.0}),
        ("dense", {"model__routing__gate": "identity"}),
    ],
)
def test_what_alters_neither_shapes_nor_meaning_may_change(kind, change):
    before, now = changed(kind, **change)
    check_same_run(now, manifest_of(before), Path("there"))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dense", {"model__hidden_size": 64}),
        ("dense", {"model__num_layers": 5}),
        ("dense", {"model__tie_embeddings": True}),
        ("dense", {"model__vocab_size": 62}),
        ("dense", {"model__normalization": "lns"}),
        ("dtf", {"model__routing__kind": "dense"}),
        ("dtf", {"model__routing__prior_factor": 0.5}),
        ("mod", {"model__routing__gate": "identity"}),
        ("mod", {"model__routing__layout": "D4"}),
        ("dtrnet-token", {"model__routing__router_type": "expert_choice"}),
        ("dense", {"training__seed": 1}),
        ("dense", {"training__sequence_length": 12}),
    ],
)
def test_all_else_is_refused_with_its_reason(kind, change):
    before, now = changed(kind, **change)
    (key,) = (name.replace("__", ".") for name in change)
    with pytest.raises(UserError) as caught:
        check_same_run(now, manifest_of(before), Path("there"))
    assert f"{key} is " in str(caught.value)
    reasons = MUST_EQUAL | {
        f"model.routing.{name}": reason for name, reason in now.model.routing.fixed.items()
    }
    assert f"({reasons[key]})" in str(caught.value)


def test_a_key_that_an_earlier_version_did_not_have_is_no_difference():
    config = tiny_config("mod")
    manifest = manifest_of(config)
    del manifest["model"]["routing"]["gate"]
    check_same_run(config, manifest, Path("there"))


@pytest.mark.parametrize(("key", "value"), [("logit_softcap", 5.0), ("sliding_window", 3), ("qk_norm", True)])
def test_what_an_earlier_version_did_not_have_its_models_did_without(key, value):
    before, now = changed("dense", **{f"model__{key}": value})
    manifest = manifest_of(before)
    del manifest["model"][key]
    with pytest.raises(UserError, match=rf"model\.{key} is (None|False) in the checkpoint and {value} here"):
        check_same_run(now, manifest, Path("there"))
    check_same_run(before, manifest, Path("there"))


def test_an_option_of_the_kind_that_came_later_was_off_before():
    before, now = changed("dtf", model__routing__scale_free=True)
    manifest = manifest_of(before)
    del manifest["model"]["routing"]["scale_free"]
    with pytest.raises(
        UserError, match=r"model\.routing\.scale_free is False in the checkpoint and True here"
    ):
        check_same_run(now, manifest, Path("there"))
    check_same_run(before, manifest, Path("there"))


@pytest.mark.parametrize(
    ("origin", "consumed", "begun", "begins"),
    [(12, 12, 0, True), (12, 16, 0, True), (12, 11, 0, False), (12, 40, 12, False), (0, 40, 0, False)],
    ids=["at their begin", "after a rollback", "too early", "inside them", "no origin"],
)
def test_other_samples_may_follow_where_they_begin(origin, consumed, begun, begins):
    before, now = changed("dense", training__sequence_length=12, data__origin=origin)
    manifest = manifest_of(before) | {"consumed_samples": consumed, "data_origin": begun}
    assert begins_data(now, manifest) == begins
    if not begins:
        with pytest.raises(UserError, match=r"training\.sequence_length is 24 in the checkpoint and 12 here"):
            check_same_run(now, manifest, Path("there"))
        return
    check_same_run(now, manifest, Path("there"))


def test_changes_are_told_with_both_values(tmp_path):
    before, now = changed("dtf", model__routing__capacity=0.25, model__init_std=0.1, output_dir="elsewhere")
    save_config(before, tmp_path / "config.yaml")
    found = changes(now, tmp_path)
    assert found == {
        "model.init_std": {"was": 0.2, "is": 0.1},
        "model.routing.capacity": {"was": 0.5, "is": 0.25},
    }
    assert changes_line(found) == (
        "model.init_std was 0.2 and is 0.1 (no effect now); model.routing.capacity was 0.5 and is 0.25"
    )
    assert changes(before, tmp_path) == {}


def test_a_threshold_keeps_its_value_under_another_momentum():
    """Few steps after the start its average is far from its value, by a factor that follows from the momentum."""
    threshold = RunningThreshold(0.99)
    for score in (1.0, 3.0, 2.0):
        threshold.end_step(torch.tensor(score))
    routing = tiny_config("dtf").model.routing
    was = asdict(replace(routing, threshold_momentum=0.99))
    now = replace(routing, threshold_momentum=0.5)
    other = RunningThreshold(0.5)
    state = threshold_state(threshold.state(), was, now)
    assert state is not None
    other.set_state(state, torch.device("cpu"))
    assert float(other.value) == pytest.approx(float(threshold.value))
    assert (
        threshold_state(threshold.state(), was, replace(routing, threshold_momentum=0.99))
        == threshold.state()
    )
    # of another k: begins anew
    assert threshold_state(threshold.state(), was, replace(now, capacity=0.1)) is None
    assert threshold_state(None, was, now) is None
