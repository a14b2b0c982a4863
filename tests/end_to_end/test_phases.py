"""A run in phases is a chain of runs: bit for bit, wherever it is interrupted; and it does not go back behind a phase's begin."""

import math
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from megadyn import network, pretrain
from megadyn.checkpoint import layout
from megadyn.config import load_config
from megadyn.data.indexed_writer import IndexedWriter
from tests.helpers.crew import Crew, lines, resumed_at
from tests.helpers.sabotage import spoiled_losses
from tests.helpers.tiny import ROOT

ENDS = (3, 7, 9)
"""Iterations at which the three phases end. A checkpoint follows each second step, and each phase."""


class Phased(NamedTuple):
    config_file: Path
    out: Path
    output: str
    text: str
    """Prefix of a dataset."""
    other: str
    """Of another one."""


def told_of_models(_rank: int) -> None:
    """The rank says after each phase how many models of earlier ones are still in memory."""
    models: list[weakref.ref[Any]] = []
    release, collect = pretrain.release, pretrain.collect_memory

    def release_and_note(engine: Any) -> None:
        models.append(weakref.ref(engine.module))
        release(engine)

    def collect_and_tell() -> None:
        collect()
        print("models left:", sum(model() is not None for model in models))

    pretrain.release, pretrain.collect_memory = release_and_note, collect_and_tell


def spoilt_first_step(_rank: int, micro_batches: int = 4) -> None:
    """The first training step of the process is bad; evaluations are not."""
    real, left = network.linear_cross_entropy, micro_batches

    def loss(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal left
        left -= torch.is_grad_enabled()
        return real(*arguments, **named) * (math.nan if torch.is_grad_enabled() and left >= 0 else 1.0)

    network.linear_cross_entropy = loss


@pytest.fixture(scope="module")
def phased(tmp_path_factory: pytest.TempPathFactory) -> Phased:
    """A run whose phases have another mix, another sequence length, another batch, another capacity and a decay.

    Its data never change, so that no two tokens are so near the cut of a router that layouts choose differently.
    """
    folder = tmp_path_factory.mktemp("phases")
    text, other = str(folder / "text"), str(folder / "other")
    for seed, prefix in enumerate((text, other)):
        with IndexedWriter(Path(prefix), "<u2") as writer:
            writer.add(np.random.default_rng(seed).integers(32, 127, 20000), [100] * 200, [1] * 200)
            writer.finish()
    config_file = folder / "config.yaml"
    config_file.write_text(f"""
model:
  {{hidden_size: 32, num_layers: 4, num_heads: 4, num_kv_heads: 2, init_std: 0.2, routing: {{kind: dtf}}}}
data: {{train: {text}, split: [0.9, 0.1, 0], test: {other}}}
tokenizer: {{path: byte}}
training: {{global_batch_size: 4, micro_batch_size: 1, sequence_length: 48, eval_samples: 4}}
optimizer: {{warmup_iterations: 2, learning_rate: 1.0e-3, min_learning_rate: 1.0e-5}}
checkpoint: {{interval: 2, keep: 0}}
logging: {{interval: 1, tensorboard: false}}
precision: fp32
deepspeed_config: {ROOT}/ds_configs/zero1.json
output_dir: {folder}/out
phases:
  - {{name: hold, iterations: 3}}
  - name: mix
    iterations: 4
    data: {{train: [{{prefix: {other}, weight: 1}}, {{prefix: {text}, weight: 3}}]}}
    model: {{routing: {{capacity: 0.25}}}}
    optimizer: {{schedule: linear}}
  - name: long
    iterations: 2
    training: {{sequence_length: 96, global_batch_size: 2}}
    model: {{rope: {{theta: 50000}}}}
""")
    crew = Crew(config_file, sabotage=told_of_models)
    assert crew.wait() == [0], crew.output()
    return Phased(config_file, folder / "out", crew.output(), text, other)


def tensors(out: Path, iteration: int) -> dict[str, bytes]:
    folder = out / "checkpoints" / layout.folder_name(iteration)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def losses(out: Path) -> dict[int, float]:
    return {line["iteration"]: line["lm_loss"] for line in lines(out) if "lm_loss" in line}


def back_at(phased: Phased, iteration: int, folder: Path) -> Path:
    """A copy of the run as it was at a checkpoint: a file of its configuration that goes on from there."""
    shutil.copytree(phased.out, folder / "out")
    for path in (folder / "out/checkpoints").glob("iteration-*"):
        if layout.iteration_of(path) > iteration:
            shutil.rmtree(path)
    (folder / "out/checkpoints/latest").unlink()
    config = yaml.safe_load(phased.config_file.read_text()) | {"output_dir": f"{folder}/out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def test_the_run_equals_three_runs_chained_by_hand(phased: Phased, tmp_path: Path) -> None:
    config = yaml.safe_load(phased.config_file.read_text())
    del config["phases"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"output_dir": f"{tmp_path}/out"}))
    mix = f"[{{prefix: {phased.other}, weight: 1, order: 1}}, {{prefix: {phased.text}, weight: 3, skip: 12, order: 0}}]"
    runs = [
        ["training.iterations=3", "optimizer.schedule_end=9", "model.max_position=96"],
        [
            "training.iterations=7",
            f"data.train={mix}",
            "data.origin=12",
            "model.routing.capacity=0.25",
            "optimizer.schedule=linear",
            "optimizer.warmup_iterations=0",
            "optimizer.schedule_begin=3",
        ],
        [
            "training.iterations=9",
            "training.sequence_length=96",
            "training.global_batch_size=2",
            "data.origin=28",
            "model.rope.theta=50000",
        ],
    ]
    for overrides, end in zip(runs, ENDS, strict=True):
        crew = Crew(tmp_path / "config.yaml", *overrides)
        assert crew.wait() == [0], crew.output()
        assert tensors(tmp_path / "out", end) == tensors(phased.out, end) != {}
    assert losses(tmp_path / "out") == losses(phased.out)


def test_metrics_are_one_file_that_names_the_phases(phased: Phased) -> None:
    found = lines(phased.out)
    assert [line["phase"] for line in found if "lm_loss" in line] == ["hold"] * 3 + ["mix"] * 4 + ["long"] * 2
    tokens = [line["consumed_tokens"] for line in found if "lm_loss" in line]
    assert tokens == [192 * step for step in range(1, 10)]
    begins = [(line["iteration"], line["phase_begins"]["name"]) for line in found if "phase_begins" in line]
    assert begins == [(0, "hold"), (3, "mix"), (7, "long")]
    assert [line["iteration"] for line in found if "test" in line] == [9]
    assert [line["iteration"] for line in found if "validation" in line] == [0, *ENDS]
    assert "phase 2 of 3, mix, begins: iterations 4 to 7, steps of 4 x 48 tokens" in phased.output
    assert "2/9" in phased.output and "left" in phased.output  # progress counts the whole run
    assert load_config(phased.out / "config.yaml").phases == load_config(phased.config_file).phases


def test_a_phase_leaves_no_model_behind(phased: Phased) -> None:
    assert phased.output.count("models left: 0\n") == 2 and phased.output.count("models left") == 2


@pytest.mark.parametrize(
    ("iteration", "world"), [(3, 1), (4, 1), (4, 2)], ids=["at a boundary", "inside", "another layout"]
)
def test_it_goes_on_as_if_it_had_not_been_interrupted(
    iteration: int, world: int, phased: Phased, tmp_path: Path
) -> None:
    crew = Crew(back_at(phased, iteration, tmp_path), f"parallel.pipeline={world}", world=world)
    assert crew.wait() == [0] * world, crew.output()
    assert resumed_at(crew.output()) == iteration
    if world == 1:
        assert tensors(tmp_path / "out", 9) == tensors(phased.out, 9)
    found, straight = (torch.tensor(list(losses(out).values())) for out in (tmp_path / "out", phased.out))
    torch.testing.assert_close(found, straight, rtol=0 if world == 1 else 1e-5, atol=0)


def test_a_bad_step_does_not_take_a_phase_back_behind_its_begin(phased: Phased, tmp_path: Path) -> None:
    """The first step of `mix` goes back to the last checkpoint of `hold`, whose data and capacity are others."""
    rollback = ["training.on_bad_step=rollback", "checkpoint.interval=100"]
    spoilt = partial(spoiled_losses, factors={1: math.nan})
    config_file = back_at(phased, 3, tmp_path)
    crew = Crew(config_file, *rollback, sabotage=spoilt)
    assert crew.wait() == [0], crew.output()
    assert "step 4 (samples 12 to 15) is bad" in crew.output() and "back to iteration 3" in crew.output()
    assert "phase 3 of 3, long, begins" in crew.output()


def test_a_bad_last_step_does_not_take_the_run_into_the_phase_again(phased: Phased, tmp_path: Path) -> None:
    """Its checkpoint does not count as good at a later start, but the weights are those of the step before."""
    skip = ["training.on_bad_step=skip", "checkpoint.interval=100"]
    crew = Crew(back_at(phased, 2, tmp_path), *skip, sabotage=spoilt_first_step)
    assert crew.wait() == [0], crew.output()
    assert (
        "step 3 (samples 8 to 11) is bad" in crew.output()
        and "; skipped (1 bad steps so far)" in crew.output()
    )
    assert crew.output().count("phase 2 of 3, mix, begins") == 1


def test_phases_behind_the_checkpoint_cannot_change(phased: Phased, tmp_path: Path) -> None:
    config_file = back_at(phased, 4, tmp_path)
    text = config_file.read_text()
    config_file.write_text(text.replace("iterations: 3", "iterations: 2"))
    crew = Crew(config_file)
    assert crew.wait() == [2]
    assert (
        "phase 'hold' cannot change once it has begun: its steps were 4 x 48 tokens up to iteration 3, and here "
        "they are 4 x 48 up to 2" in crew.errors()[0]
    )
    config_file.write_text(text)
    crew = Crew(config_file, "training.global_batch_size=8")
    assert crew.wait() == [2] and "phase 'hold' cannot change once it has begun" in crew.errors()[0]


def test_a_fault_of_the_last_phase_shows_before_the_first_step(phased: Phased, tmp_path: Path) -> None:
    config = yaml.safe_load(phased.config_file.read_text()) | {"output_dir": f"{tmp_path}/out"}
    config["phases"][2]["data"] = {"train": f"{tmp_path}/missing"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    crew = Crew(tmp_path / "config.yaml")
    assert crew.wait() == [2]
    assert crew.errors()[0].startswith(f"error: phase 'long': dataset {tmp_path}/missing: no file")
    assert not (tmp_path / "out/metrics.jsonl").exists()
