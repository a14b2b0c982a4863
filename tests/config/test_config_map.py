"""config.json, ours <-> Hugging Face's."""

from typing import Any

import pytest

from megadyn.config.config_map import from_hf_config, to_hf_config
from megadyn.errors import UserError
from tests.helpers.tiny import KINDS, tiny_config


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str) -> None:
    model = tiny_config(kind).model
    found = from_hf_config(to_hf_config(model, "float32"))
    assert to_hf_config(found, "float32") == to_hf_config(model, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' in config.json: must be one of megadyn, qwen2, llama, mistral",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' in config.json: must be 'silu'"),
        ({"routing": 3}, "config.json: a value of a wrong type"),
        ({"routing": {"kind": []}}, "routing.kind = .* in config.json: must be the name of a kind"),
        ({"routing": {"kind": "dtf", "capacity": "half"}}, "config.json: a value of a wrong type"),
        ({"rope_parameters": {"rope_theta": "much"}}, "config.json: a value of a wrong type"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"num_hidden_layers": 2.5}, "config.json: a value of a wrong type"),
        ({"hidden_size": "big"}, "hidden_size = 'big' in config.json: must be a number"),
        ({"routed_layer_types": ["dense"] * 4}, "routed_layer_types in config.json"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_hf_config(to_hf_config(tiny_config("dtf").model, "float32") | changes)
    assert "\n" not in str(caught.value)
