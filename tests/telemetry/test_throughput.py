"""Speed by several measures."""

import pytest

from megadyn.costs.operations import block_flops
from megadyn.planning.flops import dense_twin, layer_flops, training_flops
from megadyn.telemetry.lines import train_line
from megadyn.telemetry.throughput import Throughput
from tests.helpers.tiny import tiny_config

STEP_S, WORLD = 0.5, 4
TOKENS = 4 * 24


def rates(config, routing=None, device=None) -> dict:
    return Throughput(config, WORLD, device).rates(STEP_S, routing or {})


def test_rates_follow_from_the_time_of_a_step():
    config = tiny_config("dtf")
    found, flops = rates(config), training_flops(config.model, 24)
    assert found["tokens_per_second"] == TOKENS / STEP_S
    assert found["tokens_per_second_per_gpu"] == TOKENS / STEP_S / WORLD
    assert found["model_tflops"] == pytest.approx(flops * 4 / STEP_S / WORLD / 1e12)
    dense = training_flops(tiny_config("dense").model, 24)
    assert flops < dense
    assert found["dense_equivalent_tflops"] == pytest.approx(found["model_tflops"] * dense / flops)
    assert found["mfu_causal_half"] is None and found["mfu_whole_square"] is None


def test_a_dense_model_is_its_own_twin():
    config = tiny_config("dense")
    assert rates(config)["dense_equivalent_tflops"] == rates(config)["model_tflops"]
    assert dense_twin(tiny_config("mod").model).layer_types == ["dense"] * 4


def test_mfu_is_over_a_given_or_a_known_peak():
    config = tiny_config("mod", precision="bf16")
    known = rates(config, device="NVIDIA H200")
    assert known["mfu_causal_half"] == pytest.approx(known["model_tflops"] / 989.5)
    assert rates(config, device="Some other device")["mfu_causal_half"] is None
    config.logging.peak_tflops = 2.0
    given = rates(config, device="NVIDIA H200")
    assert given["mfu_causal_half"] == pytest.approx(given["model_tflops"] / 2)
    unseen = 3 * sum(layer.attention for layer in layer_flops(config.model, 24)) * 4 / STEP_S / WORLD / 1e12
    assert given["mfu_whole_square"] - given["mfu_causal_half"] == pytest.approx(unseen / 2)


def test_of_tokens_that_choose_for_themselves_those_count_that_attended():
    config = tiny_config("dtrnet-token")
    few, more = ({layer: {"routed_fraction": share} for layer in (1, 3)} for share in (0.25, 0.75))
    gained = block_flops(config.model, 24, 18) - block_flops(config.model, 24, 6)
    per_second = 3 * 2 * gained * 4 / STEP_S / WORLD / 1e12
    assert rates(config, more)["model_tflops"] - rates(config, few)["model_tflops"] == pytest.approx(
        per_second
    )
    planned = {layer: {"routed_fraction": 0.5} for layer in (1, 3)}
    assert rates(tiny_config("mod"), planned) == rates(tiny_config("mod"))  # a fixed capacity is what it is


def test_without_a_peak_the_log_line_has_no_mfu():
    record = {"iteration": 1, "lm_loss": 1.0, "aux_losses": {}, "grad_norm": 1.0, "routing": {}}
    config = tiny_config()
    assert "MFU" not in train_line(record | rates(config), 10, 1)
    config.logging.peak_tflops = 1e-3
    share = rates(config)["mfu_causal_half"]
    assert f"MFU {share:.1%}" in train_line(record | rates(config), 10, 1)
