"""What the engine computes, the exported modelling files compute: against the independent oracle, with a cache, padded."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from megadyn.config.config_map import from_hf_config, to_hf_config
from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.network import Network, routed_layers, set_routing_mode, thresholds_of
from megadyn.parallel.params import name_of
from tests.helpers.networks import end_step, make_network
from tests.helpers.oracle import oracle_logits
from tests.helpers.tiny import tiny_config, tiny_tokens

KINDS = ["nested", "subskip", "skip_middle", "stt", "dtf-relative", "stt-scale-free"]
NORMS = ["pre", "lns", "hybridnorm"]
TOKENS = tiny_tokens(1)[0][:3, :-1]


def both(kind: str, norm: str = "pre") -> tuple[Network, MegadynForCausalLM]:
    """A network, so far trained that its layers take some tokens and not others, and its export, both in float64."""
    config = tiny_config(kind, normalization=norm)
    network = make_network(config)
    with torch.no_grad():
        for name, param in network.named_parameters():
            if kind == "skip_middle" and name.endswith("router.weight"):
                param.mul_(3)  # so that tokens leave at both layers
    network(TOKENS, TOKENS)
    end_step(network)
    fields = json.loads(json.dumps(to_hf_config(config.model, "float64")))
    assert from_hf_config(fields).routing.name == config.model.routing.name
    model = MegadynForCausalLM(MegadynConfig(**fields)).double().eval()
    weights = {name_of(param): param.detach() for param in network.parameters()}
    for index, threshold in thresholds_of(routed_layers(network)).items():
        weights[f"model.layers.{index}.causal_router.threshold"] = threshold.value.reshape(1)
    model.load_state_dict(weights)
    for layer in routed_layers(network):
        layer.monitor.read()
    set_routing_mode(routed_layers(network), "causal")
    return network, model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_export_equals_engine_and_oracle(tmp_path, kind, norm):
    with torch.enable_grad():
        network, model = both(kind, norm)
    want = network(TOKENS)
    choosing = [layer for layer in routed_layers(network) if layer.chooses]
    shares = [float(layer.monitor.read()["routed_fraction"]) for layer in choosing]
    assert any(0.1 < share < 0.9 for share in shares), (
        "some tokens are to be taken, or the test shows nothing"
    )
    found = model(TOKENS, output_routing=True)
    assert_close(found.logits, want, rtol=0, atol=1e-9)
    if kind != "subskip":  # whose share is of both halves, and the map attention's
        routed = [found.routing[layer.index].double().mean().item() for layer in choosing]
        assert routed == pytest.approx(shares)
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(oracle_logits(tmp_path, TOKENS.numpy()), want.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_decoding_of_padded_rows_equals_one_forward(kind, side):
    with torch.enable_grad():
        _, model = both(kind)
    column, length = torch.arange(24), torch.tensor([24, 15, 2])[:, None]
    mask = {"none": torch.ones(3, 24), "left": column >= 24 - length, "right": column < length}[side].long()
    whole = model(TOKENS, mask, use_cache=False).logits
    cache, parts, end = None, [], 0
    for step in (5, 1, 9, 1, 8):
        start, end = end, end + step
        output = model(TOKENS[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-9)
    for row in range(3):
        alone = model(TOKENS[row : row + 1, mask[row].bool()], use_cache=False).logits
        assert_close(whole[row, mask[row].bool()], alone[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_beams_reorder_every_cache(kind):
    with torch.enable_grad():
        _, model = both(kind)
    given = {
        "attention_mask": torch.ones_like(TOKENS),
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": 3,
        "pad_token_id": 0,
    }
    beams = [model.generate(TOKENS, **given, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)


@torch.no_grad()
def test_the_second_pass_keeps_keys_of_its_own_tokens_alone():
    with torch.enable_grad():
        _, model = both("nested")
    output = model(TOKENS, output_routing=True)
    for index in (1, 3):
        cache = output.past_key_values.layers[index]
        assert cache.counts == [24] * 3
        assert cache.second().counts == output.routing[index].sum(1).tolist()


def test_mirrors_that_do_not_match_are_refused():
    fields = to_hf_config(tiny_config("skip_middle").model, "float32")
    name = next(name for name in ("routed_layer_types", "layer_types") if name in fields)
    with pytest.raises(ValueError, match="must be half skip_middle_out"):
        MegadynConfig(**fields | {name: fields[name][::-1]})
