"""Engine <-> checkpoint.

The files do not contain ZeRO partitions and load under any ZeRO stage, data-parallel size and topology.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.checkpoint import layout
from megadyn.checkpoint.host_copies import HostCopies
from megadyn.checkpoint.merge import ShardedTensors, TensorSource, part_for, routing_state
from megadyn.checkpoint.same_run import SAME_TRAINING, begins_data, check_same_run
from megadyn.checkpoint.states import OptimizerAccess
from megadyn.checkpoint.trained import Trained
from megadyn.checkpoint.writing import Snapshot, write
from megadyn.errors import RunError, UserError
from megadyn.hf.reader import THRESHOLD
from megadyn.hf.source import open_source
from megadyn.kinds import DENSE, Kind, TopK
from megadyn.log import log
from megadyn.network import thresholds_of, trackers_of
from megadyn.parallel.objects import all_gather
from megadyn.parallel.params import component, counts_here, name_of, part_shape
from megadyn.progress import each


class PoisonedWeights(RunError):
    """Weights, moments or routing state contain NaN or infinity; earlier checkpoints are intact."""

    is_everywhere = True


def snapshot(
    engine: Trained,
    *,
    iteration: int,
    consumed_samples: int,
    data_key: str = "",
    loss_rule: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    copies: HostCopies | None = None,
) -> Snapshot:
    """Copies to host memory what a checkpoint holds, each rank its part. Collective.

    Args:
        data_key: identifies the training data and their order.
        loss_rule: state of the rule that detects bad steps.
        more: additional entries for the manifest.
        copies: of an earlier snapshot, whose memory this one takes over.

    Raises:
        PoisonedWeights: on every rank, if anything to be saved is NaN or infinite.
    """
    shards, bad = _shards(engine, copies or HostCopies())
    stages = [state for state in all_gather(_routing_state(engine)) if state]
    routing: dict[str, dict[str, dict[str, float]]] = {}
    for stage in stages:
        for name, of_layers in stage.items():
            routing.setdefault(name, {}).update(of_layers)
    bad = next((f"rank {rank}'s {name}" for rank, name in enumerate(all_gather(bad)) if name), None)
    if bad or not all(
        math.isfinite(value)
        for kind in routing.values()
        for state in kind.values()
        for value in state.values()
    ):
        raise PoisonedWeights(
            f"{bad or 'the routing state'} is NaN or infinite at iteration {iteration}: nothing was saved"
        )
    manifest = {
        "format": layout.FORMAT,
        "iteration": iteration,
        "consumed_samples": consumed_samples,
        "topology": {
            "tensor": engine.grid.tp.size,
            "pipeline": engine.grid.pp.size,
            "data": engine.grid.dp.size,
            "zero": engine.zero_stage,
        },
        "model": asdict(engine.config.model),
        "data_key": data_key,
        "training": {key: getattr(engine.config.training, key) for key in SAME_TRAINING},
        "optimizer": engine.config.optimizer.name,
        "optimizer_steps": OptimizerAccess(engine).steps,
        "loss_scaler": engine.loss_scaler_state(),
        "loss_rule": loss_rule,
        "routing": routing,
        **(more or {}),
    }
    return Snapshot(iteration, shards, manifest)


def save(engine: Trained, root: Path, *, iteration: int, consumed_samples: int, data_key: str = "") -> Path:
    """Writes a checkpoint under `root` and returns its folder. Collective.

    Raises:
        CheckpointError: on every rank, if any rank could not write. Its files are removed.
        PoisonedWeights: see `snapshot`.
    """
    taken = snapshot(engine, iteration=iteration, consumed_samples=consumed_samples, data_key=data_key)
    return write(taken, root, engine.config)


def _shards(engine: Trained, copies: HostCopies) -> tuple[dict[str, dict[str, Tensor]], str | None]:
    """This rank's part of weights and moments, copied to host memory: {file name: {tensor name: tensor}}; and the name
    of the first tensor with NaN or infinity. The device checks, because a CPU core would need seconds per GB."""
    grid, access = engine.grid, OptimizerAccess(engine)
    copies.begin()
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    is_finite: dict[str, Tensor] = {}
    for turn, param in enumerate(engine.parameters()):
        found = access.get(param)  # collective; one of the ranks keeps and writes the result
        if turn % grid.dp.size == grid.dp.rank and counts_here(param, grid.tp):
            values = {key: copies.copy(value) for key, value in found.items()}
            # All flags are read once at the end; offloaded states are on the host.
            for key, value in found.items():
                is_finite[f"{name_of(param)}/{key}".removesuffix("/weight")] = (
                    value.isfinite().all().to(engine.device)
                )
            weights[name_of(param)] = values["weight"]
            moments |= {f"{name_of(param)}/{key}": values[key] for key in access.states(param)}
    found_finite = torch.stack(list(is_finite.values())).tolist() if is_finite else []
    copies.finish()
    bad = next((name for name, fine in zip(is_finite, found_finite, strict=True) if not fine), None)
    return {
        layout.shard_file(kind, grid.pp.rank, grid.tp.rank, grid.dp.rank): tensors
        for kind, tensors in (("weights", weights), ("optimizer", moments))
        if tensors
    }, bad


def _routing_state(engine: Trained) -> dict[str, dict[str, dict[str, float]]]:
    """State that routed layers carry from step to step, by name and layer, from one rank of each stage."""
    if engine.grid.tp.rank or engine.grid.dp.rank:
        return {}
    return {
        name: {str(index): tracker.state() for index, tracker in of_layers.items()}
        for name, of_layers in trackers_of(engine.routed).items()
    }


def load(engine: Trained, folder: Path, data_key: str | None = None) -> dict[str, Any]:
    """Sets weights, optimizer and routing state from a verified checkpoint; returns its manifest. An average is for engines
    that have not taken a step.

    Raises UserError if the checkpoint is of another model or, if `data_key` is given, of other training data.
    """
    manifest = layout.read_manifest(folder)
    check_same_run(engine.config, manifest, folder)
    is_same = data_key in (None, manifest["data_key"])
    if not is_same and not begins_data(engine.config, manifest):
        raise UserError(
            f"{folder} was trained on other data or in another order (data.train, data.split), so its "
            "position in the data does not apply; checkpoint.allow_other_data=true resumes anyway"
        )
    weights = ShardedTensors(folder, "weights")
    known = weights.names()
    lacking = [name_of(param) for param in engine.parameters() if name_of(param) not in known]
    if strange := [name for name in lacking if CAUSAL_RULE not in name]:
        raise UserError(f"{folder} has no tensor {strange[0]} ({len(strange)} are missing)")
    # An average has no moments; those of an engine that has not taken a step are zero.
    moments = None if "averaged" in manifest else ShardedTensors(folder, "optimizer")
    set_parameters(engine, weights, moments)
    OptimizerAccess(engine).steps = manifest["optimizer_steps"]
    engine.set_loss_scaler_state(manifest["loss_scaler"])
    for name, of_layers in trackers_of(engine.routed).items():
        saved = routing_state(manifest, name)
        for index, tracker in of_layers.items():
            state = saved.get(str(index))
            if name == "thresholds":
                state = threshold_state(state, manifest["model"]["routing"], engine.config.model.routing)
            elif state is None:
                raise UserError(f"{folder}: damaged: its manifest lacks {name} of layer {index}")
            if state is not None:
                tracker.set_state(state, engine.device)
    return manifest


CAUSAL_RULE = ".causal_router."
"""Part of the names of a predictor's tensors. When a run switches to another causal rule, that rule starts from scratch."""


def threshold_state(
    state: dict[str, float] | None, was: dict[str, Any], now: Kind
) -> dict[str, float] | None:
    """A saved running threshold converted to the settings of `now`; None if it must start from scratch.

    A threshold is an average of k-th highest scores, so it is invalid under another capacity, which changes k. The
    average starts from 0, and the momentum it was computed with corrects for that (`RunningThreshold.value`), so it is
    invalid under another momentum. Neither applies to thresholds of kinds without top-k, which are kept unchanged.
    """
    if not isinstance(now, TopK):
        return state
    if state is None or was["capacity"] != now.capacity:
        return None
    before, momentum, steps = was["threshold_momentum"], now.threshold_momentum, state["steps"]
    if before == momentum or not steps:
        return state
    return state | {"average": state["average"] * (1 - momentum**steps) / (1 - before**steps)}


def init_from(engine: Trained, path: Path) -> None:
    """Loads the weights of a Hugging Face folder. A routed model may load a dense one: tensors that this lacks
    (routers, priors) keep their initial values. Collective.

    Raises UserError for another model, and for a missing or an unexpected tensor, by name.
    """
    folder = open_source(path, engine.config.model, engine.config.training.sequence_length)
    upcycled = folder.model.routing.name == DENSE
    wanted = set().union(*all_gather({name_of(param) for param in engine.parameters()}))
    given = {name for name in folder.names() if not name.endswith(THRESHOLD)}
    missing = sorted(name for name in wanted - given if not (upcycled and component(name) != "base"))
    if missing:
        raise UserError(f"{path} has no tensor {missing[0]} ({len(missing)} are missing)")
    if unexpected := sorted(given - wanted):
        raise UserError(
            f"{path} has a tensor that the model lacks: {unexpected[0]} ({len(unexpected)} in total)"
        )
    set_parameters(engine, folder)
    for index, threshold in thresholds_of(engine.routed).items():
        name = f"model.layers.{index}.{THRESHOLD}"
        # An export's threshold; it counts as one step, so the average soon moves on.
        if name in folder.names():
            average = float(folder.whole(name)) * (1 - threshold.momentum)
            threshold.set_state({"average": average, "steps": 1}, engine.device)


def set_parameters(engine: Trained, weights: TensorSource, moments: TensorSource | None = None) -> None:
    """Sets every parameter that `weights` has, and its moments if given."""
    access, rank, sharding = OptimizerAccess(engine), engine.grid.tp.rank, engine.sharding
    known = weights.names()
    parameters = list(engine.parameters())
    for param in each(parameters, "loading weights", len(parameters)):
        name = name_of(param)
        if name in known:
            shape, rows = part_shape(param), access.rows(param)
            values = {"weight": part_for(weights, name, sharding, rank, shape, rows)}
            if moments is not None and access.has_states(param):
                values |= {
                    key: part_for(moments, f"{name}/{key}", sharding, rank, shape, rows)
                    for key in access.states(param)
                }
            access.set(param, values)


def newest_good(root: Path, *, only_good: bool = False) -> Path | None:
    """The best intact checkpoint under `root`. Skipped ones are logged. Collective.

    A checkpoint that does not count as good (`layout.reservation`) is used, with a warning, only if there is no other;
    with `only_good` it is never used.

    Raises UserError if there are checkpoints but none is intact: a run must not silently start from scratch.
    """
    # Rank 0's view decides: on a network file system other ranks may see an older one.
    complete = layout.complete_checkpoints(root)
    listed, doubts = all_gather(
        (layout.good_first(complete), {str(path): layout.reservation(path) for path in complete})
    )[0]
    for folder in listed:
        problem = verify(folder)
        doubt = doubts[str(folder)]
        if problem is None and doubt and only_good:
            return None
        if problem is None:
            for newer in (path for path in listed if path.name > folder.name and doubts[str(path)]):
                log.warning("checkpoint skipped: %s: %s", newer, doubts[str(newer)])
            if doubt:
                log.warning("%s: %s, but there is no better one", folder, doubt)
            return folder
        log.warning("checkpoint skipped: %s", problem)
    if listed:
        raise UserError(
            f"{root}: none of {len(listed)} checkpoints is intact; start again in another output_dir, for example "
            "from a copy elsewhere, with checkpoint.fork_from=PATH"
        )
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Each file is read once; the files are divided among the ranks. Collective."""
    try:
        names = sorted(layout.read_manifest(folder)["files"])
        problem = layout.damage(folder, names[dist.get_rank() :: dist.get_world_size()])
    except UserError as error:
        problem = str(error)
    return next((found for found in all_gather(problem) if found), None)
