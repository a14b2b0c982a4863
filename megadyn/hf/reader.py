"""A Hugging Face folder as a source of whole tensors."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megadyn.config import ModelConfig
from megadyn.config.config_map import eod_of_masked, from_hf_config
from megadyn.errors import UserError
from megadyn.files import read_json
from megadyn.kinds.older import log_offset, newer_name, newer_threshold_of, older_name

THRESHOLD = "causal_router.threshold"
"""Suffix of a threshold's name."""
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Tensors that follow from config.json, which older versions of transformers saved."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS_AT_ONCE = 16384
"""Of two weights that are compared."""


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
        if not index.exists() and not (folder / files[0]).exists() and any(folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{folder} has its weights in .bin files, which may run code when they are read: save it as safetensors "
                f"first (AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) of transformers) and give the new folder"
            )
        self._where: dict[str, Any] = {}
        for name in files:
            try:
                handle = safe_open(folder / name, framework="pt")
            except Exception as error:  # the library raises its own types for a missing or damaged file
                raise UserError(f"{folder / name}: {error}") from None
            self._where |= dict.fromkeys(itertools.filterfalse(DERIVED.search, handle.keys()), handle)
        if self.model.tie_embeddings and HEAD in self._where:
            self._leave_out_head()

    def _leave_out_head(self) -> None:
        """A tied model's head is its embedding; some files hold it once more."""
        if EMBEDDING in self._where and not self._equal(HEAD, EMBEDDING):
            raise UserError(
                f"{self.folder}: {HEAD} differs from {EMBEDDING}, but config.json says that they are one "
                "(tie_word_embeddings)"
            )
        del self._where[HEAD]

    def _equal(self, one: str, other: str) -> bool:
        """Read in parts, so that neither is ever held whole."""
        a, b = (self._where[name].get_slice(name) for name in (one, other))
        if a.get_shape() != b.get_shape():
            return False
        starts = range(0, a.get_shape()[0], ROWS_AT_ONCE)
        return all(torch.equal(a[i : i + ROWS_AT_ONCE], b[i : i + ROWS_AT_ONCE]) for i in starts)

    def names(self) -> set[str]:
        return set(map(newer_name, self._where))

    def shape(self, name: str) -> Sequence[int]:
        if name not in self._where:
            return self.whole(name).shape
        shape: list[int] = self._where[name].get_slice(name).get_shape()
        return shape

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """`whole(name)[first:stop]`; only these rows are read."""
        if name not in self._where or name.endswith(THRESHOLD):
            return self.whole(name)[first:stop]
        found: Tensor = self._where[name].get_slice(name)[first:stop]
        return found

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
