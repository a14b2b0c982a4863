"""Builds one rank's part of the model as the engine would, but without values, and checks it against the whole model."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from megadyn.config import Config, batch_plan, engine_settings
from megadyn.engine.pipeline import part_boundaries
from megadyn.errors import RunError, UserError
from megadyn.model.block import LayerContext
from megadyn.network import LayerMaker, layer_list
from megadyn.parallel.grid import Axis, Grid
from megadyn.parallel.params import ParamMaker, name_of
from megadyn.parallel.sharding import Sharding
from megadyn.planning.layouts import GIB, Machine, stage_cuts, workload
from megadyn.planning.memory import Memory, host_memory, rank_memory, refuse_offloading
from megadyn.planning.muon import muon_number
from megadyn.planning.parameters import stage_parameters, total_parameters
from megadyn.routing.layer import LossScale

Shapes = dict[str, tuple[int, ...]]
"""Keys are the parameters' Hugging Face names."""


class DryRun(NamedTuple):
    """What was built for one rank; all checks have passed."""

    rank: int
    world: int
    grid: Grid
    first_layer: int
    end_layer: int
    tensors: int
    parameters: int
    whole_parameters: int
    memory: Memory
    host: float
    """Bytes of its node's host memory used by offloading."""
    fits: bool

    def text(self) -> str:
        places = " ".join(
            f"{name} {axis.rank} of {axis.size}"
            for name, axis in (("tensor", self.grid.tp), ("pipeline", self.grid.pp), ("data", self.grid.dp))
        )
        parts = "  ".join(f"{name} {size / GIB:.1f}" for name, size in self.memory._asdict().items())
        host = f"\n  offloaded: {self.host / GIB:.1f} GiB of its node's host memory" if self.host else ""
        ends = ["the embedding"] * self.grid.is_first_stage + ["the head"] * self.grid.is_last_stage
        return "\n".join(
            [
                f"rank {self.rank} of {self.world:,}: {places}",
                f"  layers {self.first_layer} to {self.end_layer - 1}{''.join(f', {end}' for end in ends)}",
                f"  {self.tensors:,} tensors with {self.parameters:,} of the model's {self.whole_parameters:,} "
                "parameters; checked",
                f"  {self.memory.total / GIB:.1f} GiB{'' if self.fits else ', which does not fit'}: {parts}{host}",
            ]
        )

    def record(self) -> dict[str, Any]:
        """For JSON; memory in GiB."""
        grid = {
            name: axis.rank
            for name, axis in (("tensor", self.grid.tp), ("pipeline", self.grid.pp), ("data", self.grid.dp))
        }
        return {
            "rank": self.rank,
            **grid,
            "layers": [self.first_layer, self.end_layer],
            "tensors": self.tensors,
            "parameters": self.parameters,
            "whole_parameters": self.whole_parameters,
            "memory_gib": self.memory.total / GIB,
            "memory": {name: size / GIB for name, size in self.memory._asdict().items()},
            "host_gib": self.host / GIB,
            "fits": self.fits,
        }


def dry_run(config: Config, machine: Machine, rank: int) -> DryRun:
    """Builds rank `rank`'s stage of `config`'s layout on all of the machine's GPUs.

    Raises:
        UserError: the layout cannot run there, the rank does not exist, or the vocabulary size is missing.
        RunError: a check failed.
    """
    if config.model.vocab_size is None:
        raise UserError(
            "model.vocab_size is not set: give it to plan without a tokenizer (model.vocab_size=...)"
        )
    zero = engine_settings(config)["zero_optimization"]
    refuse_offloading(zero, config.deepspeed_config)
    plan = batch_plan(config, machine.gpus)
    if not 0 <= rank < machine.gpus:
        raise UserError(f"--rank {rank}: must be 0 to {machine.gpus - 1} on {machine.gpus} GPUs")
    grid = place_of(rank, config.parallel.tensor, config.parallel.pipeline, plan.data_parallel)
    cuts, stage = stage_cuts(config), grid.pp.rank
    parts = parts_of(config, grid.tp)
    bounds = part_boundaries(cuts, len(parts))
    stages = [shapes_of(part for part in parts[a:b]) for a, b in pairwise(bounds)]
    if config.model.tie_embeddings:
        tie(stages)
    whole = shapes_of(parts_of(config, Axis("tp")))
    if config.model.tie_embeddings:
        tie([whole])
    check_stages(stages, whole)
    check_cuts(stages[stage], whole, sharding_of(config, grid.tp.size), grid.tp.rank, config.model.vocab_size)
    held, total = count(stages[stage]), count(whole)
    check_equal("parameters of the whole model", total, total_parameters(config.model))
    check_equal(
        f"parameters of stage {stage}", held, stage_parameters(config.model, grid.tp.size, cuts)[stage]
    )
    work = workload(config)
    layout: dict[str, Any] = {
        "precision": config.precision,
        "zero": zero,
        "data": plan.data_parallel,
        "muon": muon_number(config),
    }
    memory = rank_memory(work, cuts, stage, micro_batches=plan.micro_batches, **layout)
    host = host_memory(work, cuts, stage, **layout)
    return DryRun(
        rank,
        machine.gpus,
        grid,
        cuts[stage],
        cuts[stage + 1],
        len(stages[stage]),
        held,
        total,
        memory,
        host,
        memory.total <= (machine.memory_gib - machine.reserve_gib) * GIB,
    )


def place_of(rank: int, tensor: int, pipeline: int, data: int) -> Grid:
    """The grid position of `rank`, without any communication. The tensor axis is fastest, then data, then pipeline, as
    in `make_grid`."""
    return Grid(
        Axis("tp", rank % tensor, tensor),
        Axis("pp", rank // (tensor * data), pipeline),
        Axis("dp", rank // tensor % data, data),
    )


def sharding_of(config: Config, tensor: int) -> Sharding:
    assert config.model.num_kv_heads is not None
    return Sharding(tensor, config.model.num_kv_heads)


def parts_of(config: Config, tp: Axis) -> list[LayerMaker]:
    """The list of layers, ready to be built without values as rank `tp.rank` of the tensor group."""
    make = ParamMaker(sharding_of(config, tp.size), config.training.seed, tp, device="meta")
    return layer_list(LayerContext(config.model, make, recompute=config.training.recompute), LossScale())


def shapes_of(parts: Iterable[LayerMaker]) -> Shapes:
    found: Shapes = {}
    for part in parts:
        for param in part.build(*part.arguments).parameters():
            if name_of(param) in found:
                raise RunError(f"{name_of(param)} is built twice")
            found[name_of(param)] = tuple(param.shape)
    return found


def tie(stages: Sequence[Shapes]) -> None:
    """Replaces the head's shape by the embedding's: a tied head is a copy of the embedding (on one stage, the embedding
    itself)."""
    del stages[-1]["lm_head.weight"]
    stages[-1]["model.embed_tokens.weight"] = stages[0]["model.embed_tokens.weight"]


def check_stages(stages: Sequence[Shapes], whole: Shapes) -> None:
    """Raises RunError unless each tensor is on exactly one stage; a tied embedding is on the first and the last."""
    for name in whole:
        holding = [stage for stage, shapes in enumerate(stages) if name in shapes]
        shared = (
            [0, len(stages) - 1]
            if name == "model.embed_tokens.weight" and "lm_head.weight" not in whole
            else holding[:1]
        )
        if not holding or holding != sorted(set(shared)):
            raise RunError(f"{name} is on stages {holding}")
    if unknown := set().union(*stages) - set(whole):
        raise RunError(f"the whole model has no {sorted(unknown)[0]}")


def check_cuts(shapes: Shapes, whole: Shapes, sharding: Sharding, rank: int, vocab_size: int) -> None:
    """Raises RunError unless each shape is this rank's part of the whole tensor, and the parts of all ranks join to
    the whole."""
    for name, shape in shapes.items():
        dim, full = sharding.dim(name), list(whole[name])
        if dim is not None:
            # A tensor whose values number the slices along the cut; all other dimensions have size 1.
            line = torch.arange(full[dim]).view([-1 if d == dim else 1 for d in range(len(full))])
            pieces = [sharding.cut(name, line, r) for r in range(sharding.size)]
            if not torch.equal(sharding.uncut(name, pieces, vocab_size), line):
                raise RunError(f"{name}: its parts do not join to the whole")
            full[dim] = pieces[rank].shape[dim]
        check_equal(f"shape of {name}", list(shape), full)


def check_equal(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise RunError(f"{what}: built {found}, planned {wanted}")


def count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
