"""Averages checkpoints of one model, tensor by tensor, whatever layouts wrote them.

Weights from along a run, averaged, often score like those after a decay of the learning rate (arXiv 1803.05407,
2306.03241). An average is a checkpoint folder that holds:

- the averaged weights, whole, so `topology` is that of one rank;
- thresholds averaged with the same coefficients. A threshold is a statistic of the scores, which move with the weights,
  so to first order the averaged threshold belongs to the averaged weights;
- position in the data, loss rule and all other routing state (step counts, controllers of auxiliary losses) of the
  newest, from where a fork continues;
- no optimizer states: Adam's moments belong to the weights that they were collected with. A fork begins with moments
  of zero. `averaged` in the manifest says so, with the checkpoints and their coefficients.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megadyn.checkpoint import layout
from megadyn.checkpoint.merge import ShardedTensors, routing_state
from megadyn.checkpoint.same_run import flat
from megadyn.config import load_config
from megadyn.errors import UserError
from megadyn.files import readable
from megadyn.kinds import DENSE
from megadyn.log import log
from megadyn.progress import each

SHARD_BYTES = 2**29
"""Of averaged tensors that a process holds before it writes them; one tensor may be larger."""
NO_EFFECT = ("routing", "init_std", "attention")
"""Keys of `model` that do not change what the model computes, and `routing`, which is compared as an export records it."""


class Term(NamedTuple):
    """A checkpoint, and its coefficient in an average."""

    folder: Path
    weight: float


def terms_of(folders: Sequence[Path], decay: float | None) -> list[Term]:
    """Coefficients, which sum to 1, for checkpoints from the oldest to the newest: equal ones, or those of the moving
    average that starts at the first checkpoint and takes in (1 - `decay`) of each later one."""
    if decay is None:
        return [Term(folder, 1 / len(folders)) for folder in folders]
    newer = range(len(folders) - 1, -1, -1)
    return [
        Term(folder, decay**count * (1.0 if place == 0 else 1 - decay))
        for place, (folder, count) in enumerate(zip(folders, newer, strict=True))
    ]


def average(checkpoints: Sequence[Path], output: Path, decay: float | None = None) -> dict[str, Any]:
    """Writes the average of at least two checkpoints as the folder `output`, which appears complete or not at all.

    Args:
        checkpoints: in any order; they count by iteration, and those of one iteration in the given order.
        decay: of a moving average over them; None: all count the same.

    Returns:
        `output`, `iteration`, `parameters` and `averaged`, the checkpoints with their coefficients as in the manifest.

    Raises:
        UserError: an existing output, a damaged or bad checkpoint, or checkpoints of different models.
    """
    _refuse_output(output)
    if len({folder.resolve() for folder in checkpoints}) < len(checkpoints):
        raise UserError("a checkpoint is named twice; each counts once")
    if len(checkpoints) < 2:
        raise UserError("one checkpoint is no average: name at least two, or a run's folder with --last N")
    manifests = {folder: layout.read_manifest(folder) for folder in checkpoints}
    folders = sorted(checkpoints, key=lambda folder: manifests[folder]["iteration"])
    for folder in folders:
        if reason := layout.condemned(folder):
            raise UserError(f"{folder} is not good: {reason}")
        log.info("verifying %s", folder)
        if problem := layout.damage(folder, averaged_files(folder)):
            raise UserError(problem)
        if difference := differs(folder, folders[-1]):
            raise UserError(f"{folder} and {folders[-1]} are different models: {difference}")
    terms = terms_of(folders, decay)
    temporary = output.with_name(f"{layout.WRITING}{output.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files, parameters = write_part(terms, temporary)
        write_rest(terms, temporary, files, decay)
        layout.sync_folder(temporary)
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output}: not written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    manifest = layout.read_manifest(output)
    return {
        "output": str(output),
        "iteration": manifest["iteration"],
        "parameters": parameters,
        "averaged": manifest["averaged"]["of"],
    }


def _refuse_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: name another folder, or remove it")
    if output.absolute().parent.name == layout.CHECKPOINTS:
        raise UserError(
            f"{output}: a run would take it for a checkpoint of its own and resume from it; name a folder outside "
            f"{layout.CHECKPOINTS}/"
        )


def averaged_files(folder: Path) -> list[str]:
    """The files of a checkpoint that an average reads."""
    return sorted(
        name
        for name in layout.read_manifest(folder)["files"]
        if name.startswith("weights-") or name == "config.yaml"
    )


def differs(one: Path, other: Path) -> str | None:
    """The first respect in which two checkpoints are not the same model; None if they are. Initial values and weights
    of auxiliary losses may differ."""
    was, now = (_computed(folder) for folder in (one, other))
    for key in dict.fromkeys([*was, *now]):
        if was.get(key) != now.get(key):
            return f"{key} is {was.get(key)!r} in one and {now.get(key)!r} in the other"
    return None


def _computed(folder: Path) -> dict[str, Any]:
    """What determines the tensors of a checkpoint's model and what it computes: key of the configuration -> value."""
    model = load_config(folder / "config.yaml").model
    shape = {key: value for key, value in asdict(model).items() if key not in NO_EFFECT}
    layers = "".join("T" if layer == DENSE else "D" for layer in model.layer_types)
    routing = model.routing.to_export(model) | {"layout": layers}
    return flat({"model": shape | {"routing": routing}})


def write_part(
    terms: Sequence[Term], folder: Path, part: int = 0, parts: int = 1, shard_bytes: int = SHARD_BYTES
) -> tuple[dict[str, Any], int]:
    """Averages every `parts`-th tensor, beginning with the `part`-th, one at a time, in float64, into files of at most
    `shard_bytes` in fp32. Returns {file name: size and digest}, and the number of parameters."""
    sources = [ShardedTensors(term.folder, "weights") for term in terms]
    for source in sources[:-1]:
        if strange := sorted(source.names() ^ sources[-1].names()):
            raise UserError(f"{strange[0]} is not in both {source.folder} and {sources[-1].folder}")
    written: dict[str, Any] = {}
    pending: dict[str, Tensor] = {}
    parameters = 0

    def flush() -> None:
        # The last number tells files of one rank apart, as those of data-parallel ranks.
        path = folder / layout.shard_file("weights", 0, 0, part + parts * len(written))
        save_file(pending, path)
        readable(path)
        layout.sync_file(path)
        written[path.name] = layout.file_digest(path)
        pending.clear()

    names = sorted(sources[-1].names())[part::parts]
    for name in each(names, "averaging tensors", len(names)):
        mean = averaged_tensor(sources, [term.weight for term in terms], name)
        if pending and sum(tensor.nbytes for tensor in pending.values()) + mean.nbytes > shard_bytes:
            flush()
        pending[name] = mean
        parameters += mean.numel()
    if pending:
        flush()
    return written, parameters


def averaged_tensor(sources: Sequence[ShardedTensors], weights: Sequence[float], name: str) -> Tensor:
    """The weighted sum of a tensor of all sources, summed in float64, in fp32. Holds one of them at a time."""
    total = sources[0].whole(name).double().mul_(weights[0])
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        whole = source.whole(name)
        if whole.shape != total.shape:
            raise UserError(
                f"{name} has shape {tuple(whole.shape)} in {source.folder} and {tuple(total.shape)} in {sources[0].folder}"
            )
        total.add_(whole, alpha=weight)
    return total.float().contiguous()


def write_rest(terms: Sequence[Term], folder: Path, files: dict[str, Any], decay: float | None) -> None:
    """Completes an average whose weights, `files`, are written; `decay` as in `terms_of`."""
    config = folder / "config.yaml"
    shutil.copyfile(terms[-1].folder / config.name, config)
    layout.sync_file(config)
    files = files | {config.name: layout.file_digest(config)}
    layout.write_manifest(folder, _manifest(terms, decay) | {"files": files})


def _manifest(terms: Sequence[Term], decay: float | None) -> dict[str, Any]:
    """The newest checkpoint's, with averaged thresholds, and without what belongs to its optimizer and layout."""
    manifests = [layout.read_manifest(term.folder) for term in terms]
    newest = manifests[-1]
    of = [
        {"folder": str(term.folder.resolve()), "iteration": manifest["iteration"], "weight": term.weight}
        for term, manifest in zip(terms, manifests, strict=True)
    ]
    routing = {"thresholds": _thresholds(terms, manifests)}
    if "routing" in newest:  # up to version 0.1 its parts were at the top level
        routing = {"routing": newest["routing"] | routing}
    return newest | {
        "topology": {"tensor": 1, "pipeline": 1, "data": 1, "zero": 0},
        "optimizer_steps": 0.0,
        "averaged": {
            "decay": decay,
            "of": [entry for manifest, itself in zip(manifests, of) for entry in _expanded(manifest, itself)],
        },
        **routing,
    }


def _expanded(manifest: dict[str, Any], itself: dict[str, Any]) -> list[dict[str, Any]]:
    """`itself`, an entry of `averaged`; for an average its own entries, so that the list names what runs saved."""
    if "averaged" not in manifest:
        return [itself]
    return [entry | {"weight": entry["weight"] * itself["weight"]} for entry in manifest["averaged"]["of"]]


def _thresholds(terms: Sequence[Term], manifests: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each layer's averaged threshold, as the running average that gives it after the newest checkpoint's steps."""
    found = {}
    for layer, newest in routing_state(manifests[-1], "thresholds").items():
        value = 0.0
        for term, manifest in zip(terms, manifests, strict=True):
            state = routing_state(manifest, "thresholds").get(layer)
            if state is None:
                raise UserError(f"{term.folder}: damaged: its manifest lacks the threshold of layer {layer}")
            value += term.weight * state["average"] / _bias(manifest, state["steps"])
        found[layer] = newest | {"average": value * _bias(manifests[-1], newest["steps"])}
    return found


def _bias(manifest: dict[str, Any], steps: float) -> float:
    """What a running threshold's average is short of its value by, as a factor (`RunningThreshold.value`)."""
    momentum: float = manifest["model"]["routing"].get("threshold_momentum", 0.0)
    return 1 - momentum**steps if steps else 1.0
