"""DTF exports of earlier versions: the offset itself as a weight, thresholds on G, no `routing.score`."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.hf.reader import HfFolder
from tests.hf.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 25, seed=5)


def in_older_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    older = {}
    for name, value in state.items():
        if name.endswith("router.ce_log_offset"):
            older[name.replace("log_", "")] = value.exp()
        else:
            older[name] = -torch.expm1(-value) if name.endswith("threshold") else value
    return older


def write_older(folder: Path, **offsets: float) -> MegadynForCausalLM:
    """Fills `folder` with an older export, and returns the model that it is of."""
    model = tiny_model("dtf4")
    model.save_pretrained(folder)
    state = in_older_form(load_file(folder / "model.safetensors"))
    for name, value in offsets.items():
        state[f"model.layers.0.router.{name}"].fill_(value)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["routing"]["score"]
    (folder / "config.json").write_text(json.dumps(config))
    return model


@torch.no_grad()
@pytest.mark.parametrize("mode", ["causal", "topk"])
def test_an_older_export_is_the_same_model_and_is_saved_in_the_newer_form(tmp_path, mode):
    model, older = write_older(tmp_path / "older"), MegadynForCausalLM.from_pretrained(tmp_path / "older")
    assert older.config.routing["score"] == "log"
    for each in (model, older):
        each.config.routing_mode = mode
    assert_close(older(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=0)
    older.save_pretrained(tmp_path / "newer")
    again, info = MegadynForCausalLM.from_pretrained(tmp_path / "newer", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert_close(again.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_older_weights_are_converted_by_load_state_dict(tmp_path):
    """As `Trainer` does where it resumes from a checkpoint that an older export's code wrote."""
    model = write_older(tmp_path)
    fresh = tiny_model("dtf4")
    for parameter in fresh.parameters():
        parameter.zero_()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, value in model.state_dict().items():
        assert_close(fresh.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_older_configuration_alone_runs_by_the_older_rules(tmp_path):
    model = write_older(tmp_path)
    older = MegadynForCausalLM(MegadynConfig.from_pretrained(tmp_path)).eval()
    assert older.config.routing["score"] == "gate"
    older.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_close(older(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=0)


def test_training_reads_an_older_export_as_the_newer_one(tmp_path):
    model = write_older(tmp_path)
    folder = HfFolder(tmp_path)
    assert folder.names() == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert_close(folder.whole(name), value, rtol=1e-5, atol=1e-6)


def test_a_threshold_of_one_is_finite_and_an_offset_below_zero_is_refused(tmp_path):
    model = write_older(tmp_path, ce_offset=-0.1)
    with pytest.raises(ValueError, match=r"router\.ce_offset = -0\.1 has no logarithm"):
        MegadynForCausalLM.from_pretrained(tmp_path)
    state = in_older_form(model.state_dict())
    state["model.layers.1.causal_router.threshold"] = torch.ones(1)
    model.load_state_dict(state)
    assert model.model.layers[1].causal_router.threshold.item() == pytest.approx(25 * math.log(2))
