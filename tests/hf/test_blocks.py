"""Norms of queries and keys, stretched and missing rotary positions, a bias on attention's output, a sliding window, capped
logits: in every kind, the engine, its export with and without a cache, and the float64 oracle agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from megadyn.config import RopeConfig
from megadyn.config.rope_map import from_hf_rope
from megadyn.errors import ConfigError
from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.rope_megadyn import rotary_table
from megadyn.kinds import BUILT_IN
from megadyn.model.rope import Rotary
from tests.conformance.checks import Case, logits_of, modes_of, tokens_like
from tests.conformance.exported import decoded, write_export
from tests.helpers.oracle import oracle_logits
from tests.helpers.tiny import tiny_config
from tests.hf.tiny_models import tiny_config as tiny_export

LENGTH = 24
"""Twice the original context below."""
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_max_position": 12},
    "llama3": {"factor": 4.0, "original_max_position": 12, "low_freq_factor": 1.0, "high_freq_factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position": 12, "beta_fast": 3.0},
}


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_kind_has_the_blocks(kind: str, tmp_path: Path) -> None:
    network, config = write_export(
        Case(kind, "blocks", ()),
        tmp_path / "hf",
        length=LENGTH,
        qk_norm=True,
        output_bias=True,
        logit_softcap=1.5,
        sliding_window=5,
        window_layers=[0, 1, 3],
        rope=RopeConfig(type="yarn", theta=100.0, skip_layers=[1, 3], **ROPES["yarn"]),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    tokens, _ = tokens_like(2, LENGTH)
    for mode in modes_of(config):
        want = torch.from_numpy(oracle_logits(tmp_path / "hf", tokens.numpy(), mode=mode)).float()
        model.config.routing_mode = mode
        assert_close(logits_of(network, tokens, mode), want, rtol=0, atol=2e-4)
        with torch.no_grad():
            assert_close(model(tokens, use_cache=False).logits, want, rtol=0, atol=2e-4)
    model.config.routing_mode = "causal"
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        assert_close(decoded(model, tokens, 7), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ROPES)
def test_types_of_rotary_positions(name: str, tmp_path: Path) -> None:
    rope = RopeConfig(type=name, theta=100.0, **ROPES[name])
    network, _ = write_export(Case("dense", "rope", ()), tmp_path / "hf", length=LENGTH, rope=rope)
    plain, _ = write_export(
        Case("dense", "rope", ()), tmp_path / "plain", length=LENGTH, rope=RopeConfig(theta=100.0)
    )
    tokens, _ = tokens_like(2, LENGTH)
    found = logits_of(network, tokens, "causal")
    want = torch.from_numpy(oracle_logits(tmp_path / "hf", tokens.numpy())).float()
    assert_close(found, want, rtol=0, atol=2e-4)
    is_close = torch.allclose(found, logits_of(plain, tokens, "causal"), rtol=0, atol=1e-2)
    assert is_close == (name == "default")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    with torch.no_grad():
        assert_close(model(tokens, use_cache=False).logits, want, rtol=0, atol=2e-4)
        if name == "dynamic":  # rows of other lengths
            mask = torch.ones_like(tokens)
            mask[1, :9] = 0
            alone = model(tokens[1:, 9:], use_cache=False).logits
            assert_close(model(tokens, attention_mask=mask, use_cache=False).logits[1:, 9:], alone)
            with pytest.raises(ValueError, match="give each text a row of its own"):
                model(tokens, position_ids=torch.arange(24).view(1, -1) % 12, use_cache=False)


@pytest.mark.parametrize("name", ["default", "yarn"])
def test_gradients_pass_a_turn(name: str) -> None:
    """Also one that scales: the way back is then no plain turn by the opposite angle."""
    rope = RopeConfig(name, 100.0, **ROPES[name])
    rope.check()
    rotary, positions = Rotary(8, rope), torch.tensor([[0, 3, 17]])
    q, k = (torch.randn(1, 3, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, positions, LENGTH), (q, k))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_slow": 2},
    ],
    ids=lambda parameters: "-".join(map(str, parameters.values())),
)
def test_angles_are_transformers(parameters: dict[str, Any], head_dim: int, length: int) -> None:
    theirs = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=8192,
        rope_parameters=parameters | {"rope_theta": 5e5},
    )
    frequency, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        theirs, torch.device("cpu"), seq_len=length
    )
    angle = torch.outer(torch.arange(length).double(), frequency.double())
    described = {"rope_parameters": parameters | {"rope_theta": 5e5}, "max_position_embeddings": 8192}
    cos, sin = Rotary(head_dim, from_hf_rope(described, 1e4)).angles(length, torch.zeros(1).double())
    # their frequencies are rounded to float32: at position n that moves an angle by n * 2^-24
    assert_close(cos, scale * angle.cos(), rtol=0, atol=length * 2**-22)
    assert_close(sin, scale * angle.sin(), rtol=0, atol=length * 2**-22)
    exported = MegadynConfig(
        **described, hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=2
    )
    position = torch.arange(length)[None]
    table = rotary_table(exported, position, torch.ones_like(position).bool(), torch.float64)
    if "mscale" not in parameters:  # an export names the factor itself
        assert_close(table[0][0, :, : head_dim // 2], cos, rtol=0, atol=1e-9)
        assert_close(table[1][0, :, head_dim // 2 :], sin, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rope": RopeConfig(type="yran")}, "model.rope.type = 'yran': must be one of .*did you mean 'yarn'"),
        (
            {"rope": RopeConfig(factor=2.0)},
            "model.rope.factor = 2.0: must be null with model.rope.type = default",
        ),
        (
            {"rope": RopeConfig("linear")},
            "model.rope.factor = None: must be given with model.rope.type = linear",
        ),
        ({"rope": RopeConfig("linear", factor=0.5)}, "model.rope.factor = 0.5: must be at least 1"),
        (
            {"rope": RopeConfig("yarn", factor=2.0)},
            "model.rope.original_max_position = None: must be given with model.rope.type = yarn",
        ),
        (
            {"rope": RopeConfig("llama3", factor=2.0, original_max_position=8, low_freq_factor=9.0)},
            "model.rope.high_freq_factor = 4.0: must be a finite number above model.rope.low_freq_factor = 9.0",
        ),
        ({"rope": RopeConfig(skip_layers=[1, 4])}, "model.rope.skip_layers = 4: must be a layer from 0 to 3"),
        ({"qk_norm": True, "normalization": "hybridnorm"}, "model.qk_norm = True: must be false with"),
        (
            {"rope": RopeConfig("dynamic", factor=2.0, original_max_position=8), "head_dim": 2},
            "model.head_dim = 2: must be at least 4",
        ),
    ],
)
def test_what_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny_config("dense", **model)


def test_a_base_that_follows_the_length_knows_no_documents() -> None:
    config = tiny_config("dense", rope=RopeConfig("dynamic", factor=2.0, original_max_position=8))
    config.data.document_mask = True
    with pytest.raises(
        ConfigError, match=r"model\.rope\.type = 'dynamic': must be another one with data\.doc"
    ):
        config.checked()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type = 'longrope'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": -1.0}},
            "factor = -1.0: must be a number above",
        ),
        ({"qk_norm": True, "normalization": "hybridnorm"}, "qk_norm = True"),
        ({"no_rope_layers": [1]}, "no_rope_layers has 1 entries, but num_hidden_layers = 3"),
    ],
)
def test_an_export_refuses_what_it_cannot_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        tiny_export("dense", **changes)
