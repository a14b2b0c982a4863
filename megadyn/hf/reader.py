"""A Hugging Face folder as a source of whole tensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megadyn.config import ModelConfig
from megadyn.errors import UserError
from megadyn.hf.config_map import eod_of_masked, from_hf_config
from megadyn.kinds.older import log_offset, newer_name, newer_threshold_of, older_name

THRESHOLD = "causal_router.threshold"
"""Suffix of a threshold's name."""


class HfFolder:
    """config.json and safetensors of a folder. Tensors are read on demand. Exports of older DTF models are converted."""

    def __init__(self, folder: Path):
        self.folder = folder
        config = read_json(folder / "config.json")
        self.model: ModelConfig = from_hf_config(config)
        self.eod: int | None = eod_of_masked(config)
        self.newer_threshold = newer_threshold_of(config.get("routing", {}))
        """Converts the thresholds of an older export; None if they need no conversion."""
        self.dtype: str = config.get("dtype") or config.get("torch_dtype") or "float32"
        index = folder / "model.safetensors.index.json"
        files = files_of(index) if index.exists() else ["model.safetensors"]
        self._where: dict[str, Any] = {}
        for name in files:
            try:
                handle = safe_open(folder / name, framework="pt")
            except Exception as error:  # the library raises its own types for a missing or damaged file
                raise UserError(f"{folder / name}: {error}") from None
            self._where |= dict.fromkeys(handle.keys(), handle)

    def names(self) -> set[str]:
        return set(map(newer_name, self._where))

    def whole(self, name: str) -> Tensor:
        if name not in self._where:
            older = older_name(name)
            return log_offset(self._read(older), f"{self.folder}: {older}")
        tensor = self._read(name)
        if self.newer_threshold is not None and name.endswith(THRESHOLD):
            return torch.full_like(tensor, self.newer_threshold(tensor.item()))
        return tensor

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor


def files_of(index: Path) -> list[str]:
    """The shards named in an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensor names to files")
    return sorted(set(weight_map.values()))


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return content
