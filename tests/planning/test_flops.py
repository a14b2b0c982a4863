"""Operations that are planned with, against those that torch counts in a real forward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadyn.config import Config
from megadyn.planning.flops import block_flops, head_flops, layer_costs, training_flops
from tests.networks import make_network, with_routing
from tests.tiny import tiny_config, tiny_tokens

BATCH = 3


def uncounted_attention(config: Config, tokens: int) -> float:
    """torch counts a causal attention's whole square of scores, the plan its lower half."""
    model = config.model
    return 2 * 2 * tokens * tokens * model.num_heads * model.head_dim / 2


def counted(config: Config, length: int) -> int:
    network = make_network(config, dtype=torch.float32)
    tokens = tiny_tokens(1, BATCH, length)[0][:, :-1]
    # torch's own counter knows nothing of the fused attention for CPUs, and would count it as free.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["dense", "dtf"])
@pytest.mark.parametrize("length", [24, 150])
def test_a_forward_pass_costs_what_is_planned(kind, length):
    config = with_routing(tiny_config(kind, num_layers=5), prior_factor=0.5)
    model = config.model
    plan = sum(layer_costs(model, length)) + head_flops(model, length)
    for layer in model.layer_types:
        plan += uncounted_attention(config, length // 2 if layer == "dtf_dynamic" else length)
    assert counted(config, length) == pytest.approx(BATCH * plan, rel=0.01)


def test_a_skipping_layer_costs_less_than_its_capacity_for_attention_is_quadratic():
    config = with_routing(tiny_config("dtf"), capacity=0.25)
    dense, dynamic = block_flops(config.model, 400), layer_costs(config.model, 400)[1]
    assert dynamic == block_flops(config.model, 100)
    assert dynamic < 0.25 * dense


def test_a_training_step_costs_three_forward_passes():
    model = tiny_config("dtf").model
    assert training_flops(model, 24) == pytest.approx(3 * (sum(layer_costs(model, 24)) + head_flops(model, 24)))


def test_a_dense_layer_is_counted_by_hand():
    model = tiny_config("dense", hidden_size=8, num_heads=2, num_kv_heads=1, ffn_size=12, qkv_bias=False).model
    tokens, q, k, v, o, mlp = 10, 8 * 8, 8 * 4, 8 * 4, 8 * 8, 3 * 8 * 12
    attention = 2 * 10 * 10 * 8 / 2            # scores and values: two products of [T, T] with 8 columns, half of them seen
    assert block_flops(model, tokens) == 2 * tokens * (q + k + v + o + mlp) + 2 * attention
