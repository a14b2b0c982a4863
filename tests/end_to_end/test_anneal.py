"""A run with an annealed capacity is the chain of runs with its capacities, wherever it stops and however it is divided."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from megadyn.checkpoint import layout
from megadyn.config import load_config
from megadyn.data.indexed_writer import IndexedWriter
from tests.helpers.crew import Crew, lines, resumed_at
from tests.helpers.tiny import ROOT


class Annealed(NamedTuple):
    config_file: Path
    out: Path


@pytest.fixture(scope="module")
def annealed(tmp_path_factory: pytest.TempPathFactory) -> Annealed:
    """Capacities 1 (two steps), 0.625 (two steps) and 0.25 (one step)."""
    folder = tmp_path_factory.mktemp("anneal")
    with IndexedWriter(folder / "text", "<u2") as writer:
        writer.add(np.random.default_rng(0).integers(32, 127, 8000), [100] * 80, [1] * 80)
        writer.finish()
    config_file = folder / "config.yaml"
    config_file.write_text(f"""
model:
  hidden_size: 32
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  init_std: 0.2
  routing: {{kind: mod, capacity: 0.25}}
data: {{train: {folder}/text, split: [1, 0, 0]}}
tokenizer: {{path: byte}}
training:
  iterations: 5
  anneal: {{capacity: 1, iterations: 4, levels: 2}}
  global_batch_size: 4
  micro_batch_size: 2
  sequence_length: 48
optimizer: {{warmup_iterations: 1, learning_rate: 1.0e-3}}
checkpoint: {{interval: 1, keep: 0}}
logging: {{interval: 1, tensorboard: false}}
precision: fp32
deepspeed_config: {ROOT}/ds_configs/zero1.json
output_dir: {folder}/out
""")
    crew = Crew(config_file)
    assert crew.wait() == [0], crew.output()
    assert "phase 2 of 3, run.2, begins: iterations 3 to 4" in crew.output()
    return Annealed(config_file, folder / "out")


def weights(out: Path, iteration: int) -> dict[str, bytes]:
    folder = out / "checkpoints" / layout.folder_name(iteration)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def losses(out: Path) -> torch.Tensor:
    return torch.tensor([line["lm_loss"] for line in lines(out) if "lm_loss" in line])


def test_layers_take_the_share_of_their_step_and_checkpoints_hold_it(annealed: Annealed) -> None:
    found = [line["routing"].values() for line in lines(annealed.out) if "lm_loss" in line]
    shares = [
        [layer["routed_fraction"] for layer in layers if "routed_fraction" in layer] for layers in found
    ]
    assert [share for (share,) in shares] == pytest.approx([1, 1, 0.625, 0.625, 0.25])
    for iteration, capacity in ((2, 1.0), (3, 0.625), (5, 0.25)):
        saved = load_config(annealed.out / "checkpoints" / layout.folder_name(iteration) / "config.yaml")
        assert saved.model.routing.share == capacity and saved.training.anneal.capacity is None
    whole = load_config(annealed.out / "config.yaml")
    assert whole.model.routing.share == 0.25 and whole.training.anneal.capacity == 1


def test_it_equals_runs_chained_by_hand(annealed: Annealed, tmp_path: Path) -> None:
    config = yaml.safe_load(annealed.config_file.read_text()) | {"output_dir": f"{tmp_path}/out"}
    del config["training"]["anneal"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for end, capacity in ((2, 1.0), (4, 0.625), (5, 0.25)):
        crew = Crew(
            tmp_path / "config.yaml",
            f"training.iterations={end}",
            f"model.routing.capacity={capacity}",
            "optimizer.schedule_end=5",
        )
        assert crew.wait() == [0], crew.output()
        assert weights(tmp_path / "out", end) == weights(annealed.out, end) != {}
    assert torch.equal(losses(tmp_path / "out"), losses(annealed.out))


@pytest.mark.parametrize("tensor", [1, 2])
def test_it_goes_on_inside_a_level_under_any_layout(annealed: Annealed, tmp_path: Path, tensor: int) -> None:
    shutil.copytree(annealed.out, tmp_path / "out")
    for path in (tmp_path / "out/checkpoints").glob("iteration-*"):
        if layout.iteration_of(path) > 3:
            shutil.rmtree(path)
    (tmp_path / "out/checkpoints/latest").unlink()
    config = yaml.safe_load(annealed.config_file.read_text()) | {"output_dir": f"{tmp_path}/out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    crew = Crew(tmp_path / "config.yaml", f"parallel.tensor={tensor}", world=tensor)
    assert crew.wait() == [0] * tensor, crew.output()
    assert resumed_at(crew.output()) == 3
    if tensor == 1:
        assert weights(tmp_path / "out", 5) == weights(annealed.out, 5)
    torch.testing.assert_close(
        losses(tmp_path / "out")[-2:], losses(annealed.out)[-2:], rtol=0 if tensor == 1 else 1e-5, atol=0
    )
