"""What transformers' own programs ask of a model: caches, attention functions, auto classes, a configuration that they read."""

import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megadyn.config.config_map import from_hf_config, to_hf_config
from megadyn.errors import UserError
from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.convert import write_hf_folder
from megadyn.hf.layers_megadyn import FixedLinear, ThresholdRule
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.hf.reader import HfFolder
from tests.helpers.tiny import tiny_config as engine_config
from tests.hf.test_modeling import padding, qwen2_like
from tests.hf.tiny_models import KINDS, LAYOUTS, MAIN_KINDS, random_tokens, tiny_config, tiny_model

TOKENS = random_tokens(3, 28, seed=7)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ---- layer_types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_older_configurations_are_converted(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "layer_types" not in config
    config["layer_types"] = config.pop("routed_layer_types")
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = MegadynForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(older(TOKENS).logits, model(TOKENS).logits)
    older.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["routed_layer_types"] == config["layer_types"]
    assert "layer_types" not in again


def test_layer_types_that_mean_something_else():
    full = ["full_attention"] * 4
    assert tiny_config("dtf4", layer_types=full).routed_layer_types == LAYOUTS["dtf4"][0]
    with pytest.raises(ValueError, match="layer_types = .'sliding.*must be left out"):
        tiny_config("dtf4", layer_types=["sliding_attention"] * 4)
    config = to_hf_config(engine_config("dtf").model, "float32")
    older = {**config, "layer_types": config["routed_layer_types"]}
    del older["routed_layer_types"]
    for same in (older, config | {"layer_types": full}):
        assert to_hf_config(from_hf_config(same), "float32") == config
    with pytest.raises(UserError, match="layer_types = .'sliding.*must be left out"):
        from_hf_config(config | {"layer_types": ["sliding_attention"] * 4})


@pytest.mark.parametrize("kind", ["dense", "dtf4"])
def test_transformers_base_class_reads_the_configuration(kind, tmp_path):
    """As Trainer does when it resumes."""
    tiny_config(kind).save_pretrained(tmp_path)
    assert PreTrainedConfig.from_json_file(str(tmp_path / "config.json")).model_type == "megadyn"


# ---- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_caches_of_transformers_are_refused_in_a_sentence(kind):
    model = tiny_model(kind)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        for asked in (
            partial(model, TOKENS, past_key_values=cache),
            partial(model.generate, TOKENS, past_key_values=cache, max_new_tokens=2),
        ):
            with pytest.raises(
                ValueError, match=f"is a {type(cache).__name__}, which.*creates a MegadynCache"
            ):
                asked()
    for asked in (lambda: model.generate_batch([[1, 2], [3]]), model.init_continuous_batching):
        with pytest.raises(ValueError, match="continuous batching .generate_batch. is not supported"):
            asked()


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_attentions_of_a_dense_model_are_qwen2s(side):
    model = tiny_model("dense", attn_implementation="eager")
    other = qwen2_like(model)
    other.set_attn_implementation("eager")
    mask = torch.ones_like(TOKENS) if side == "none" else padding(side)
    wanted = other(TOKENS, mask, (mask.cumsum(1) - 1).clamp(min=0), output_attentions=True).attentions
    found = model(TOKENS, mask, output_attentions=True).attentions
    for ours, theirs in zip(found, wanted, strict=True):
        real = mask.bool()[:, None, :, None].expand_as(theirs)
        assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
    cache, steps = None, []
    for start, end in ((0, 12), (12, 13), (13, 28)):
        output = model(TOKENS[:, start:end], mask[:, :end], past_key_values=cache, output_attentions=True)
        cache = output.past_key_values
        steps.append(output.attentions[0])
        assert steps[-1].shape[2:] == (end - start, end)
    real = mask.bool()[:, None, 13:, None].expand_as(steps[2])
    assert_close(steps[2][real], wanted[0][:, :, 13:][real], atol=1e-5, rtol=0)


def test_attentions_are_asked_for_by_the_configuration_too():
    model = tiny_model("dense", attn_implementation="eager")
    model.config.output_attentions = True
    assert len(model(TOKENS).attentions) == len(model.model(TOKENS).attentions) == 3
    model.config.output_attentions = False
    assert model(TOKENS).attentions is None


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_attentions_that_cannot_be_given_are_refused(kind):
    reason = (
        "needs attn_implementation = 'eager'"
        if kind == "dense"
        else "routed layers attend among different tokens"
    )
    with pytest.raises(ValueError, match=reason):
        tiny_model(kind)(TOKENS, output_attentions=True)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_attention_functions_of_others_are_used(kind):
    calls = []

    def counted(module, *args, **keywords):
        calls.append(module)
        return sdpa_attention_forward(module, *args, **keywords)

    AttentionInterface.register("counted", counted)
    model = tiny_model(kind)
    wanted = model(TOKENS).logits
    model.set_attn_implementation("counted")
    assert torch.equal(model(TOKENS).logits, wanted)
    assert calls == [layer.self_attn for layer in model.model.layers]
    with pytest.raises(ValueError, match="does not support"):
        model.set_attn_implementation("flex_attention")


# ---- classes, precision, first values ------------------------------------------------------------


def test_export_names_its_base_model_and_needs_no_trust_for_its_tokenizer(tmp_path):
    model = engine_config("dtf", vocab_size=259).model
    ours = MegadynForCausalLM(MegadynConfig(**to_hf_config(model, "float32")))
    folder = tmp_path / "export"
    folder.mkdir()
    write_hf_folder(
        folder,
        model,
        ours.state_dict().items(),
        tokenizer="byte",
        style="megadyn",
        dtype="float32",
        shard_bytes=10**9,
    )
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__name__ == "MegadynModel"
    assert_close(base(TOKENS).last_hidden_state, ours.eval().model(TOKENS).last_hidden_state)
    base.save_pretrained(tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True).config.auto_map.keys() >= {
        "AutoModel"
    }
    assert AutoTokenizer.from_pretrained(folder)("Grüße")["input_ids"] == list("Grüße".encode())
    assert HfFolder(folder).eod is None


@pytest.mark.parametrize(
    ("kind", "routers"),
    [
        ("dense", set()),
        ("dtf4", {"router", "causal_router"}),
        ("mod-bce", {"router"}),
        ("dtrnet-token", {"router"}),
    ],
)
def test_modules_kept_in_float32_exist(kind, routers):
    model = tiny_model(kind)
    for part in (model, model.model):
        assert part._keep_in_fp32_modules_strict == routers
        assert bool(part._keep_in_fp32_modules) == bool(routers)


def test_buffers_of_routers_start_with_values(monkeypatch):
    """Not with whatever lay in memory, also where transformers initialises nothing."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **keywords: empty(*args, **keywords).fill_(torch.nan))
    for module in (ThresholdRule(tiny_config("mod")), FixedLinear(4, 2)):
        for name, buffer in module.named_buffers():
            assert buffer.isfinite().all(), name


def test_rotary_positions_changed_later_are_refused():
    config = tiny_config("dense")
    config.rope_parameters = {"rope_type": "longrope", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type = 'longrope'"):
        MegadynForCausalLM(config)
