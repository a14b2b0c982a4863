"""Layouts of the example runs: which there are, what they take, and why others are not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megadyn.config import Config, batch_plan, load_config
from megadyn.errors import UserError
from megadyn.planning.flops import training_flops
from megadyn.planning.layouts import Layout, Machine, engine_files, lay_out, layouts, micro_batch_sizes
from megadyn.planning.parameters import total_parameters
from tests.helpers.tiny import ROOT, tiny_config


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    return lambda name, *words: load_config(ROOT / "examples" / name / "config.yaml", words)


@pytest.mark.parametrize("name", ["dtf_3b", "dtf_7b"])
@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_the_examples_fit_on_gpus_of_80_gib(example: Any, name: str, gpus: int) -> None:
    config = example(name)
    found, refused = layouts(config, Machine(gpus, 80))
    fitting = [layout for layout in found if layout.fits]
    assert len(fitting) > 10
    assert [layout.step_s for layout in fitting] == sorted(layout.step_s for layout in fitting)
    assert found[: len(fitting)] == fitting
    for layout in found:
        assert layout.tensor * layout.pipeline * layout.data == gpus
        assert layout.micro_batch * layout.micro_batches * layout.data == config.training.global_batch_size
        assert layout.fits == (layout.memory.total <= 76 * 2**30)
        assert 0 <= layout.bubble < 1
    assert refused
    own = [
        it
        for it in fitting
        if (it.tensor, it.pipeline, it.zero_stage, it.micro_batch, it.recompute)
        == (
            config.parallel.tensor,
            config.parallel.pipeline,
            1,
            config.training.micro_batch_size,
            config.training.recompute,
        )
    ]
    assert len(own) == 1  # the example runs as it stands


def test_what_cannot_run_is_refused_with_the_sentence_of_a_run(example: Any) -> None:
    _, refused = layouts(example("dtf_7b"), Machine(16, 80))
    said = {(it.tensor, it.pipeline, it.zero_stage): it.reason for it in refused}
    assert said[8, 1, 1] == "parallel.tensor = 8: must be a divisor of model.num_heads = 28"
    assert said[1, 1, 3].endswith("use deepspeed_config=zero2")  # it is compiled
    assert said[16, 1, 1] == "parallel.tensor is larger than the 8 GPUs of a node"
    assert "must be at least 1 with precision = bf16" in said[1, 1, 0]
    assert "must be 0 or 1 with parallel.pipeline > 1" in said[1, 2, 3]
    assert (1, 1, 1) not in said
    _, refused = layouts(example("dtf_7b", "training.global_batch_size=6"), Machine(16, 80))
    assert any("data-parallel size" in it.reason for it in refused)


def test_offloading_takes_the_optimizer_out_of_the_gpu_and_into_the_node(example: Any) -> None:
    """Figures by hand: of P parameters on 2 ranks each keeps P / 2, whose Adam has 12 bytes, gradients 4 (summed in fp32) and 4
    (flat, for Adam), weights 2."""
    found, _ = layouts(
        example("dense_3b", "training.global_batch_size=2", "training.compile=false"), Machine(2, 80)
    )
    plain, offloaded = (
        {
            (it.micro_batch, it.recompute): it
            for it in found
            if it.zero_stage == 3 and it.tensor == 1 and bool(it.host) == has_host
        }[1, "none"]
        for has_host in (False, True)
    )
    count = total_parameters(example("dense_3b").model)
    assert plain.memory[:3] == pytest.approx((2 * count / 2, 4 * count / 2, 12 * count / 2))
    assert offloaded.memory[:3] == (0, 0, 0)
    assert offloaded.memory.activations == plain.memory.activations
    assert offloaded.host == pytest.approx(2 * (12 + 4 + 4 + 2) * count / 2)  # both ranks stand on one node
    # Over the link: gradients out in bf16's fp32 and again flat, weights in, and for each of two passes; the step itself.
    link_s, step_s = (4 + 4 + 2 + 2 * 2) / 2 * count / 20e9, 2 * (28 + 2) / 2 * count / 100e9
    assert offloaded.step_s - plain.step_s == pytest.approx(link_s + step_s)
    assert offloaded.record()["host_gib"] == offloaded.host / 2**30 > 60 > plain.record()["host_gib"] == 0


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3, "offload_optimizer": {"device": "nvme"}},
        {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        {"stage": 3, "offload_param": True},
    ],
)
def test_other_offloading_is_refused(zero: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = tiny_config("dense")
    config.deepspeed_config = str(path)
    _, refused = layouts(config, Machine(2, 80))
    assert {it.reason for it in refused} >= {
        f"{path}: offload_{'param' if 'offload_param' in zero else 'optimizer'} "
        "is planned only with ZeRO-3, device cpu and ratio 1"
    }


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 3, "stage3_max_live_parameters": "x"}, "stage3_max_live_parameters"),
        ({"stage": 2, "reduce_bucket_size": "auto"}, "reduce_bucket_size"),
        ({"stage": 2, "reduce_bucket_size": -1}, "reduce_bucket_size"),
    ],
)
def test_sizes_that_are_no_numbers_are_refused(zero: dict[str, Any], key: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = tiny_config("dense")
    config.deepspeed_config = str(path)
    with pytest.raises(UserError, match=f"{key}.* must be a number of elements"):
        layouts(config, Machine(1, 80))


def test_no_vocabulary_is_no_plan() -> None:
    config = tiny_config("dense")
    config.model.vocab_size = None
    with pytest.raises(UserError, match=r"model\.vocab_size is not set"):
        layouts(config, Machine(2, 80))


def test_settings_of_the_run_come_before_those_beside_them() -> None:
    config = tiny_config("dense", zero=2)
    assert [(file.zero["stage"], "offload_param" in file.zero) for file in engine_files(config)] == [
        (0, False),
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
    config.training.micro_batch_size, config.training.global_batch_size = 3, 24
    assert micro_batch_sizes(config, batch_plan(config, 2)) == [1, 2, 3, 4]


def one(
    machine: Machine, *, zero: int = 1, gpus: int = 4, kind: str = "dtf", micro: int = 1, **parallel: int
) -> Layout:
    config: Config = tiny_config(kind, zero=zero, hidden_size=64, **parallel)
    config.training.global_batch_size, config.training.micro_batch_size = 64, micro
    settings = {file.zero["stage"]: file for file in engine_files(config)}[zero]
    return lay_out(config, settings, replace(machine, gpus=gpus))


FREE = Machine(1, 80, tflops=1e-6, node_gbytes=1e30, network_gbytes=1e30)
"""Moving costs nothing."""


def test_one_gpu_takes_as_long_as_its_operations() -> None:
    layout = one(FREE, gpus=1)
    flops = training_flops(tiny_config("dtf", hidden_size=64).model, 24) * 64
    assert layout.step_s == pytest.approx(flops / 1e6)
    assert layout.model_tflops == pytest.approx(FREE.tflops)
    assert (layout.bubble, layout.tensor_bytes, layout.pipeline_bytes, layout.data_bytes) == (0, 0, 0, 0)


def test_more_data_ranks_share_the_work_and_pipelines_idle() -> None:
    alone, data, pipe = one(FREE, gpus=1), one(FREE, gpus=4), one(FREE, gpus=4, pipeline=4)
    assert data.step_s == pytest.approx(alone.step_s / 4)
    assert pipe.step_s > 1.05 * alone.step_s / 4
    assert 0.03 < pipe.bubble < 0.6


def test_bytes_over_data_ranks_follow_the_zero_stage() -> None:
    """Of 4 ranks with P parameters of 4 bytes, each sends 3/4: two of them for a sum, one to gather."""
    tiny = {zero: one(FREE, zero=zero, kind="dense").data_bytes for zero in range(4)}
    unit = tiny[0] / 2
    assert tiny == pytest.approx({0: 2 * unit, 1: 3 * unit, 2: (2 * 16 + 1) * unit, 3: 3 * 16 * unit})


def test_bytes_over_tensor_ranks_follow_the_tokens_that_are_processed() -> None:
    """Four layers, two sums each way; a Dynamic layer's of half the tokens; the embedding's and the head's."""
    whole = 64 * 24 * 64 * 4 * 2 * (1 / 2)  # all tokens of a step, out of one of two ranks
    assert one(FREE, kind="dense", tensor=2, gpus=2).tensor_bytes == pytest.approx(whole * (4 * 4 + 2))
    assert one(FREE, kind="dtf", tensor=2, gpus=2).tensor_bytes == pytest.approx(whole * (2 * 4 + 2 * 2 + 2))


def test_sequence_parallelism_sends_chosen_tokens_once_more_and_less_between_stages() -> None:
    def laid_out(kind: str, pipeline: int = 1) -> list[Layout]:
        config = tiny_config(kind, tensor=2, pipeline=pipeline, hidden_size=64)
        settings = {file.zero["stage"]: file for file in engine_files(config)}[1]
        split = replace(config, parallel=replace(config.parallel, sequence=True))
        return [lay_out(it, settings, replace(FREE, gpus=2 * pipeline)) for it in (config, split)]

    whole = 4 * 24 * 64 * 4 * 2 * (1 / 2)
    assert [it.tensor_bytes for it in laid_out("dense")] == pytest.approx([whole * 18] * 2)
    dtf = [whole * (2 * 4 + 2 * 2 + 2), whole * (2 * 4 + 2 * 3 + 2)]
    assert [it.tensor_bytes for it in laid_out("dtf")] == pytest.approx(dtf)
    assert [it.pipeline_bytes for it in laid_out("dense", 2)] == [
        4 * 24 * (4 * 64 + 8),
        4 * 24 * (4 * 32 + 8),
    ]
    plain, split = laid_out("mod")
    assert split.step_s < plain.step_s  # routers work on their part
    assert split.memory.activations < plain.memory.activations


def test_slow_links_cost_time_between_nodes_only() -> None:
    slow = replace(FREE, network_gbytes=1e-6)
    assert one(replace(slow, node_gpus=4)).step_s == one(FREE).step_s
    there = one(replace(slow, node_gpus=2))
    assert there.step_s == pytest.approx(one(FREE).step_s + there.data_bytes / 1e3)
