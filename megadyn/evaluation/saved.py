"""Opens a model on disk, a checkpoint or an export, in one process and without DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megadyn.checkpoint.layout import damage, read_manifest, resolve
from megadyn.checkpoint.merge import ShardedTensors, TensorSource, thresholds
from megadyn.config import ModelConfig, load_config
from megadyn.errors import UserError
from megadyn.hf.reader import HfFolder
from megadyn.hf.tokenizer_files import FINGERPRINT
from megadyn.log import log
from megadyn.model.attention import attention_backend
from megadyn.model.block import LayerContext
from megadyn.network import Network, routed_layers, thresholds_of
from megadyn.parallel.params import PRECISIONS, ParamMaker, name_of
from megadyn.parallel.sharding import Sharding
from megadyn.progress import each
from megadyn.routing.layer import LossScale
from megadyn.routing.tracker import RunningThreshold
from megadyn.tokenization.tokenizer import load_tokenizer, tokenizer_settings


@dataclass
class Saved:
    """A model on disk, of either form."""

    model: ModelConfig
    weights: TensorSource
    thresholds: dict[int, RunningThreshold]
    precision: str
    sequence_length: int
    eod: int | None = None
    """The token that ends a document, if the run masked its samples by document; in an export, config.json says so."""
    fingerprint: str | None = None
    """Fingerprint of the training tokenizer; None if unknown."""


def open_saved(path: Path) -> Saved:
    """Opens a checkpoint, a run's folder (its newest checkpoint) or a Hugging Face folder. Raises UserError for
    anything else."""
    if (path / "config.json").is_file():
        return _open_hf(path)
    folder = resolve(path)
    log.info("verifying %s", folder)
    manifest = read_manifest(folder)
    if problem := damage(folder, sorted(manifest["files"])):
        raise UserError(problem)
    config = load_config(folder / "config.yaml")
    return Saved(
        config.model,
        ShardedTensors(folder, "weights"),
        thresholds(manifest),
        config.precision,
        config.training.sequence_length,
        load_tokenizer(config.tokenizer.path, config.tokenizer.eod).eod
        if config.data.document_mask
        else None,
        _fingerprint(config.tokenizer.path),
    )


def _fingerprint(tokenizer: str) -> str | None:
    try:
        return load_tokenizer(tokenizer).fingerprint
    except UserError:  # the tokenizer may not be available where the checkpoint is
        return None


def _open_hf(path: Path) -> Saved:
    folder = HfFolder(path)
    model = folder.model
    found = {}
    for layer in range(model.num_layers):
        name = f"model.layers.{layer}.causal_router.threshold"
        if name in folder.names():
            found[layer] = RunningThreshold(0.0, float(folder.whole(name)), steps=1)
    precisions = {"bfloat16": "bf16", "float16": "fp16"}
    return Saved(
        model,
        folder,
        found,
        precisions.get(folder.dtype, "fp32"),
        model.max_position or 1024,
        folder.eod,
        fingerprint=tokenizer_settings(path).get(FINGERPRINT),
    )


def load_network(saved: Saved, device: torch.device) -> Network:
    """The whole model in one process, in its own precision."""
    assert saved.model.num_kv_heads is not None
    backend, _ = attention_backend(saved.model, saved.precision)
    make = ParamMaker(Sharding(1, saved.model.num_kv_heads), device=device, dtype=PRECISIONS[saved.precision])
    network = Network(LayerContext(saved.model, make, backend, saved.eod), LossScale())
    missing = sorted({name_of(param) for param in network.parameters()} - saved.weights.names())
    if missing:
        raise UserError(f"the saved model lacks {len(missing)} of its tensors, for example {missing[0]}")
    with torch.no_grad():
        parameters = list(network.parameters())
        for param in each(parameters, "loading weights", len(parameters)):
            whole = saved.weights.whole(name_of(param))
            if whole.shape != param.shape:
                raise UserError(
                    f"{name_of(param)} has shape {tuple(whole.shape)}, but its configuration requires "
                    f"{tuple(param.shape)}"
                )
            param.copy_(whole)
    for index, threshold in thresholds_of(routed_layers(network)).items():
        if index not in saved.thresholds:
            raise UserError(f"the saved model lacks model.layers.{index}.causal_router.threshold")
        threshold.set_state(saved.thresholds[index].state(), device)
        threshold.momentum = saved.thresholds[index].momentum
    return network.eval()
