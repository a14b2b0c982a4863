"""An exported folder fine-tunes with PEFT's LoRA and quantises to int8, without a change of code."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.hf.tiny_models import MAIN_KINDS, ROUTED, random_tokens, set_thresholds, tiny_model

# peft asks by the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TEXT = random_tokens(4, 24, seed=3)
BLOCK = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
CHOOSING = {
    "dense": set(),
    "dtf_decision": {"prior.gate_proj", "prior.up_proj", "prior.down_proj"},
    "dtf_dynamic": set(),
    "mod": {"router"},
    "dtrnet": {"router.fc1", "router.fc2"},
}
"""Linear layers that help to choose tokens, by the type of layer."""


@pytest.fixture(params=MAIN_KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_model(request.param, hidden_size=64, intermediate_size=128)
    set_thresholds(model, TEXT)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, **options: object):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def linear_layers(config, chooses: bool = True) -> set[str]:
    """Names of the linear layers that a model has, those that help to choose tokens included or not."""
    return {
        f"model.layers.{i}.{name}"
        for i, kind in enumerate(config.routed_layer_types)
        for name in BLOCK | (CHOOSING[kind] if chooses else set())
    }


def test_lora_of_the_blocks_alone(folder: Path) -> None:
    model = get_peft_model(
        load(folder), LoraConfig(task_type="CAUSAL_LM", target_modules=r".*(self_attn|mlp)\..*_proj")
    )
    adapted = {
        re.sub(r".*(model\.layers.*)\.lora_.*", r"\1", name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert adapted == linear_layers(model.config, chooses=False)


def test_lora_learns_merges_and_reloads(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = load(folder)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    if base.config.routing["kind"] == "dtf":
        model.enable_input_require_grads()
        base.activation_checkpointing_enable()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    adapted = {re.sub(r".*(model\.layers.*)\.lora_.*", r"\1", name) for name in trained}
    assert adapted == linear_layers(base.config)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(12):
        loss = model(input_ids=TEXT, labels=TEXT).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    # zeros at first
    assert all(parameter.abs().sum() > 0 for name, parameter in trained.items() if "lora_B" in name)
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    assert_close(after, before, rtol=0, atol=0)  # buffers too: thresholds

    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=TEXT, output_routing=True)
        for processed, kind in zip(wanted.routing, base.config.routed_layer_types, strict=True):
            assert (processed.float().mean() < 1) == (kind in ROUTED)
        model.save_pretrained(tmp_path / "adapter")
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
        assert_close(again(input_ids=TEXT).logits, wanted.logits)
        merged = model.merge_and_unload()
        assert set(merged.state_dict()) == set(before)
        assert_close(merged(TEXT).logits, wanted.logits, atol=2e-3, rtol=0)
        merged.save_pretrained(tmp_path / "merged")
        assert_close(load(tmp_path / "merged")(TEXT).logits, wanted.logits, atol=2e-3, rtol=0)


@torch.no_grad()
def test_int8_blocks_and_exact_routers(folder: Path) -> None:
    whole = load(folder)
    quantised = torch.ao.quantization.quantize_dynamic(whole, {torch.nn.Linear}, dtype=torch.qint8)
    changed = {
        name for name, module in quantised.named_modules() if "quantized.dynamic" in type(module).__module__
    }
    routers = {name for name in linear_layers(whole.config) if ".router" in name}
    assert changed == linear_layers(whole.config) - routers | {"lm_head"}
    wanted, found = (model(TEXT, labels=TEXT, output_routing=True) for model in (whole, quantised))
    assert found.loss.item() == pytest.approx(wanted.loss.item(), abs=0.4)
    assert not torch.equal(found.logits, wanted.logits)
    same = [(a == b).float().mean() for a, b in zip(found.routing, wanted.routing, strict=True)]
    assert min(same) > 0.85
    assert quantised.generate(TEXT[:, :8], max_new_tokens=4, do_sample=False).shape == (4, 12)


def test_quantizers_of_transformers_pass_the_routers_by(folder: Path) -> None:
    """torchao, bitsandbytes and the others ask these two functions; a rounded router would choose other tokens."""
    model = load(folder)
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linear if not should_convert_module(name, skipped)} == {
        "lm_head",
        *(name for name in linear if ".router" in name),
    }
