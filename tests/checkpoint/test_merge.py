"""Rows of a rank's part of a tensor, read from the parts of other ranks: all of it and no more is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megadyn.checkpoint import layout
from megadyn.checkpoint.merge import ShardedTensors, part_for
from megadyn.errors import UserError
from megadyn.hf.reader import HfFolder
from megadyn.parallel.sharding import Sharding
from tests.helpers.tiny import tiny_config

VOCABULARY, KV_HEADS = 13, 2
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, 8),
    "model.norm.weight": (8,),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def written(folder: Path, tensors: dict[str, Tensor], size: int) -> ShardedTensors:
    """The tensors as a run of `size` tensor ranks saves them."""
    sharding = Sharding(size, KV_HEADS)
    files = [layout.shard_file("weights", 0, rank, 0) for rank in range(size)]
    for rank, file in enumerate(files):
        held = {name for name in tensors if rank == 0 or sharding.dim(name) is not None}
        save_file(
            {name: sharding.cut(name, tensors[name], rank).contiguous() for name in held}, folder / file
        )
    manifest = {
        "format": layout.FORMAT,
        "iteration": 1,
        "consumed_samples": 1,
        "topology": {"tensor": size},
        "model": {"num_kv_heads": KV_HEADS, "vocab_size": VOCABULARY, "routing": {}},
        "files": dict.fromkeys(files),
    }
    layout.write_manifest(folder, manifest)
    return ShardedTensors(folder, "weights")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_a_part_are_those_of_the_part_cut_from_the_whole(size, tensors, tmp_path):
    source = written(tmp_path, tensors, size)
    for name, whole in tensors.items():
        assert torch.equal(source.whole(name), whole) and tuple(source.shape(name)) == whole.shape
        for wanted in (1, 2, 4):
            sharding = Sharding(wanted, KV_HEADS)
            for rank in range(wanted):
                part = sharding.cut(name, whole, rank)
                for first in range(len(part) + 1):
                    for rows in (range(first, len(part)), range(first, min(first + 2, len(part)))):
                        found = part_for(source, name, sharding, rank, part.shape, rows)
                        assert torch.equal(found, part[rows.start : rows.stop]), (name, wanted, rank, rows)


def test_a_tensor_of_another_shape_is_refused_by_name(tensors, tmp_path):
    source = written(tmp_path, tensors, 2)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match=rf"{name} has the shape \(12, 8\), which is not the model's"):
        part_for(source, name, Sharding(2, KV_HEADS), 1, (5, 8), range(5))


def test_rows_of_a_folder(tensors, tmp_path, monkeypatch):
    """A folder of transformers is read by rows too."""
    monkeypatch.setattr("megadyn.hf.reader.from_hf_config", lambda config: tiny_config("dense").model)
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    folder = HfFolder(tmp_path)
    monkeypatch.setattr(HfFolder, "whole", None)
    for name, whole in tensors.items():
        assert tuple(folder.shape(name)) == whole.shape
        assert torch.equal(folder.rows(name, 1, 3), whole[1:3])
