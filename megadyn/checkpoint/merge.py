"""Joins whole tensors from the parts that ranks wrote, one at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadyn.checkpoint.layout import read_manifest
from megadyn.errors import UserError
from megadyn.kinds.older import log_offset, moment, newer_name, older_name
from megadyn.parallel.sharding import Sharding
from megadyn.routing.tracker import RunningThreshold


class TensorSource(Protocol):
    """A source of whole tensors: a checkpoint or a Hugging Face folder."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> Sequence[int]: ...

    def whole(self, name: str) -> Tensor: ...

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """`whole(name)[first:stop]`; only these rows are read."""
        ...


class ShardedTensors:
    """The tensors of one kind (`weights` or `optimizer`) of a checkpoint, read lazily. Those of older DTF models are
    converted."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        manifest: dict[str, Any] = read_manifest(folder)
        model = manifest["model"]
        self.sharding = Sharding(manifest["topology"]["tensor"], model["num_kv_heads"])
        self.vocab_size: int = model["vocab_size"]
        self._parts: dict[str, dict[int, Any]] = {}
        for file_name in manifest["files"]:
            if file_name.startswith(f"{kind}-"):
                rank = int(file_name.split("-tp")[1].split("-")[0])
                try:
                    handle = safe_open(folder / file_name, framework="pt")
                except (OSError, SafetensorError) as error:
                    raise UserError(f"{folder / file_name}: not a safetensors file: {error}") from None
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    self._parts.setdefault(name, {})[rank] = handle

    def names(self) -> set[str]:
        return set(map(newer_name, self._parts))

    def whole(self, name: str) -> Tensor:
        """The whole tensor without vocabulary padding. Optimizer states are cut like their parameter."""
        if name in self._parts:
            return self._joined(name)
        older = older_name(name)
        parameter, _, state = older.partition("/")
        if not state:
            return log_offset(self._joined(older), f"{self.folder}: {older}")
        return moment(state, self._joined(older), ShardedTensors(self.folder, "weights")._joined(parameter))

    def shape(self, name: str) -> Sequence[int]:
        if name not in self._parts:
            return self.whole(name).shape
        return self._uncut(
            name, [torch.empty(part.get_shape(), device="meta") for part in self._slices(name)]
        ).shape

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        if name not in self._parts:
            return self.whole(name)[first:stop]
        parts = self._slices(name)
        if self.sharding.dim(parameter_of(name)) != 0:
            return self._uncut(name, [part[first:stop] for part in parts])
        stop = min(stop, self.shape(name)[0])  # the padding of a vocabulary is left out
        height = parts[0].get_shape()[0]
        begins = range(0, height * len(parts), height)
        return torch.cat(
            [
                part[max(0, first - begin) : max(0, stop - begin)]
                for begin, part in zip(begins, parts, strict=True)
            ]
        )

    def _slices(self, name: str) -> list[Any]:
        """Of each part, in the order of tensor ranks; reads nothing yet."""
        return [handle.get_slice(name) for _, handle in sorted(self._parts[name].items())]

    def _joined(self, name: str) -> Tensor:
        return self._uncut(name, [handle.get_tensor(name) for _, handle in sorted(self._parts[name].items())])

    def _uncut(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        return self.sharding.uncut(parameter_of(name), parts, self.vocab_size)


def parameter_of(name: str) -> str:
    """The parameter that `NAME/exp_avg` belongs to; a weight's own name is returned unchanged."""
    return name.partition("/")[0]


def part_for(
    source: TensorSource, name: str, sharding: Sharding, rank: int, shape: Sequence[int], rows: range
) -> Tensor:
    """`rows` of this rank's part of a tensor, in fp32, independent of the topology that wrote it. Only they are read, with
    all columns.

    Raises UserError if the part does not have this `shape`.
    """
    whole = source.shape(name)
    dim, first, stop = sharding.bounds(parameter_of(name), whole, rank)
    if (*whole[:dim], stop - first, *whole[dim + 1 :]) != tuple(shape):
        raise UserError(
            f"{name} has the shape {tuple(whole)}, which is not the model's: a rank's part has {tuple(shape)}"
        )
    if dim:
        return source.rows(name, rows.start, rows.stop).narrow(dim, first, stop - first).to(torch.float32)
    found = source.rows(name, first + rows.start, first + rows.stop).to(torch.float32)
    short = len(rows) - len(found)  # vocabulary rows beyond the last are zero
    return torch.cat([found, found.new_zeros(short, *found.shape[1:])]) if short else found


def routing_state(manifest: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    """Saved state of the tracker `name`, by layer. Up to version 0.1 it was at the top level of the manifest."""
    state: dict[str, dict[str, float]] = manifest.get("routing", manifest).get(name, {})
    return state


def thresholds(manifest: dict[str, Any]) -> dict[int, RunningThreshold]:
    """The running thresholds of a checkpoint, by layer."""
    state = routing_state(manifest, "thresholds")
    momentum = manifest["model"]["routing"].get("threshold_momentum", 0.0)
    return {
        int(layer): RunningThreshold(momentum, float(of["average"]), int(of["steps"]))
        for layer, of in state.items()
    }
