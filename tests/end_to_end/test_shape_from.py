"""Upcycling in ten lines: the shape and the weights of one folder, and a run that goes on when the folder is gone."""

import shutil
from pathlib import Path

import yaml

from megadyn.checkpoint.export import export
from tests.helpers.crew import Crew, lines, resumed_at
from tests.hf.test_base_models import BASES, write_random


def test_a_run_takes_its_shape_and_its_weights_and_goes_on(config_file: Path, tmp_path: Path) -> None:
    write_random(BASES["qwen3"], tmp_path / "base")
    given = yaml.safe_load(config_file.read_text())
    given["model"] = {"shape_from": str(tmp_path / "base"), "routing": {"kind": "mod", "capacity": 0.5}}
    given |= {"training": {"iterations": 1, "global_batch_size": 2, "sequence_length": 24}}
    path = tmp_path / "upcycle.yaml"
    path.write_text(yaml.safe_dump(given | {"checkpoint": {"init_from": str(tmp_path / "base")}}))
    first = Crew(path)
    assert first.wait() == [0], first.output()
    out = tmp_path / "out"
    saved = yaml.safe_load((out / "config.yaml").read_text())["model"]
    assert (saved["num_layers"], saved["qk_norm"], saved["rope"]["type"]) == (4, True, "yarn")
    assert (saved["sliding_window"], saved["window_layers"]) == (9, [1, 2, 3])

    second = Crew(path, "training.iterations=2")
    assert second.wait() == [0], second.output()
    assert resumed_at(second.output()) == 1
    (resumed,) = [line["resumed"] for line in lines(out) if "resumed" in line]
    assert resumed["changed"].keys() == {"training.iterations"}
    shutil.rmtree(tmp_path / "base")
    export(out / "checkpoints" / "iteration-00000002", tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").exists()
