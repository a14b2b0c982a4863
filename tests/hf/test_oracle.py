"""The exported model against the independent float64 reading of its folder by routing.md alone."""

import numpy as np
import pytest
import torch

from tests.helpers.oracle import oracle_logits, oracle_loss
from tests.hf.tiny_models import (
    KINDS,
    MAIN_KINDS,
    NORMALIZATIONS,
    ROUTED,
    WINDOW,
    random_tokens,
    set_thresholds,
    tiny_model,
)

TOKENS = random_tokens(2, 3 * WINDOW + 4, seed=5)


CASES = [
    *((kind, normalization) for kind in MAIN_KINDS for normalization in NORMALIZATIONS),
    *((kind, "pre") for kind in KINDS if kind not in MAIN_KINDS),
    ("mod-predictor", "hybridnorm"),
]


@pytest.mark.parametrize("mode", ["topk", "causal"])
@pytest.mark.parametrize(("kind", "normalization"), CASES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 16}],
    ids=["bias-untied", "nobias-tied"],
)
@torch.no_grad()
def test_model_agrees_with_oracle(tmp_path, kind, normalization, mode, changes):
    model = tiny_model(kind, normalization=normalization, **changes)
    set_thresholds(model, TOKENS)
    model.config.routing_mode = mode
    model.save_pretrained(tmp_path)
    output = model(TOKENS, labels=TOKENS, output_routing=True)
    for processed, kind_of_layer in zip(output.routing, model.config.routed_layer_types, strict=True):
        if kind_of_layer in ROUTED:
            assert 0.1 < processed.float().mean() < 0.9
    np.testing.assert_allclose(
        output.logits.numpy(), oracle_logits(tmp_path, TOKENS.numpy(), mode), atol=2e-4, rtol=0
    )
    labels = np.full(TOKENS.shape, -100)
    labels[:, :-1] = TOKENS[:, 1:]
    assert output.loss.item() == pytest.approx(oracle_loss(tmp_path, TOKENS.numpy(), labels, mode), rel=1e-5)


def test_oracle_reads_shards_and_bfloat16(tmp_path):
    model = tiny_model("dtf4").bfloat16()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = (oracle_logits(tmp_path / name, TOKENS.numpy()) for name in ("whole", "shards"))
    np.testing.assert_array_equal(whole, shards)
    in_double = model.double()(TOKENS, use_cache=False).logits.detach().numpy()
    np.testing.assert_allclose(whole, in_double, atol=1e-9, rtol=0)
