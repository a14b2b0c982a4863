"""Loss of a checkpoint or an exported model on a dataset, in one process and without DeepSpeed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadyn.checkpoint.layout import damage, read_manifest, resolve
from megadyn.checkpoint.merge import ShardedTensors, TensorSource, thresholds
from megadyn.config import ModelConfig, load_config
from megadyn.data.batches import read_batch
from megadyn.data.ends import check_marked
from megadyn.data.indexed import IndexedDataset
from megadyn.data.largest import check_ids
from megadyn.data.samples import SampleSet
from megadyn.data.tokenizer import load_tokenizer, tokenizer_settings
from megadyn.errors import UserError
from megadyn.hf.reader import HfFolder
from megadyn.hf.tokenizer_files import FINGERPRINT
from megadyn.log import log
from megadyn.model.attention import attention_backend
from megadyn.model.block import LayerContext
from megadyn.network import Network, routed_layers, set_routing_mode, thresholds_of
from megadyn.parallel.params import DTYPES, ParamMaker, name_of
from megadyn.parallel.sharding import Sharding
from megadyn.routing.aux_loss import LossScale
from megadyn.routing.causal import RunningThreshold


@dataclass
class Saved:
    """A model on disk, whatever its form."""

    model: ModelConfig
    weights: TensorSource
    thresholds: dict[int, RunningThreshold]
    precision: str
    sequence_length: int
    eod: int | None = None
    """The token that ends a document, if the run masked its samples by document; its export says so in config.json."""
    fingerprint: str | None = None
    """Of the tokenizer in training; None where that is not to be found."""


def open_saved(path: Path) -> Saved:
    """A run's checkpoint (or the run's folder, for its newest) or a Hugging Face folder. UserError if it is neither."""
    if (path / "config.json").is_file():
        return _open_hf(path)
    folder = resolve(path)
    manifest = read_manifest(folder)
    if problem := damage(folder, sorted(manifest["files"])):
        raise UserError(problem)
    config = load_config(folder / "config.yaml")
    return Saved(config.model, ShardedTensors(folder, "weights"), thresholds(manifest), config.precision,
                 config.training.sequence_length,
                 load_tokenizer(config.tokenizer.path, config.tokenizer.eod).eod if config.data.document_mask else None,
                 _fingerprint(config.tokenizer.path))


def _fingerprint(tokenizer: str) -> str | None:
    try:
        return load_tokenizer(tokenizer).fingerprint
    except UserError:           # a checkpoint may lie elsewhere than its tokenizer
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
    return Saved(model, folder, found, precisions.get(folder.dtype, "fp32"), model.max_position or 1024, folder.eod,
                 fingerprint=tokenizer_settings(path).get(FINGERPRINT))


def load_network(saved: Saved, device: torch.device) -> Network:
    """The whole model in one process, in its own precision."""
    assert saved.model.num_kv_heads is not None
    backend, _ = attention_backend(saved.model, saved.precision)
    make = ParamMaker(Sharding(1, saved.model.num_kv_heads), device=device, dtype=DTYPES[saved.precision])
    network = Network(LayerContext(saved.model, make, backend, saved.eod), LossScale())
    missing = sorted({name_of(param) for param in network.parameters()} - saved.weights.names())
    if missing:
        raise UserError(f"the saved model lacks {len(missing)} of its tensors, for example {missing[0]}")
    with torch.no_grad():
        for param in network.parameters():
            whole = saved.weights.whole(name_of(param))
            if whole.shape != param.shape:
                raise UserError(f"{name_of(param)} has shape {tuple(whole.shape)}, but its configuration asks for "
                                f"{tuple(param.shape)}")
            param.copy_(whole)
    for index, threshold in thresholds_of(routed_layers(network)).items():
        if index not in saved.thresholds:
            raise UserError(f"the saved model lacks model.layers.{index}.causal_router.threshold")
        threshold.set_state(saved.thresholds[index].state(), device)
        threshold.momentum = saved.thresholds[index].momentum
    return network.eval()


@torch.no_grad()
def evaluate(path: Path, data: Path, *, modes: Sequence[str], samples: int | None = None, batch_size: int = 8,
             sequence_length: int | None = None) -> dict[str, Any]:
    """Mean next-token loss over `data`, in file order, under each routing mode.

    Args:
        modes: any of `topk` and `causal`.
        samples: only the first so many. sequence_length: the run's own when left out.

    Returns:
        A loss by mode in nats per token, `tokens` (predicted, in each mode), by mode `perplexity` and `bits_per_byte` (see
        there), and for a routed model `routed_fraction` of the last mode and `causal_agreement`, means over its routed layers.
    """
    saved = open_saved(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(saved, device)
    dataset = IndexedDataset(data)
    check_dataset(dataset, saved)
    length = sequence_length or saved.sequence_length
    chosen = SampleSet(dataset, sequence_length=length, seed=0, shuffle=False)
    count = min(len(chosen), samples or len(chosen))
    routed = routed_layers(network)
    result: dict[str, Any] = {}
    for mode in modes:
        set_routing_mode(routed, mode)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for first in range(0, count, batch_size):
            size = min(batch_size, count - first)
            tokens, labels = (torch.from_numpy(part).to(device) for part in read_batch(chosen, range(first, first + size)))
            total += network(tokens, labels).double() * size
        result[mode] = float(total) / count
        statistics = [layer.monitor.read() for layer in routed]
        for name in ("routed_fraction", "causal_agreement"):
            values = [float(record[name]) for record in statistics if name in record]
            if values:
                result[name] = sum(values) / len(values)
    losses = {mode: result[mode] for mode in modes}
    return result | {"tokens": count * length, "perplexity": {mode: perplexity(loss) for mode, loss in losses.items()},
                     "bits_per_byte": bits_per_byte(losses, dataset)}


def check_dataset(dataset: IndexedDataset, saved: Saved) -> None:
    """UserError for tokens that mean nothing to the model, or where documents end with another token than in training."""
    assert saved.model.vocab_size is not None
    check_ids(dataset, saved.model.vocab_size)
    if saved.eod is not None:
        check_marked(dataset, saved.eod)
    if (record := dataset.record) is None:
        return
    if saved.fingerprint is None:
        log.warning("nothing says which tokenizer the model was trained with: not compared with that of %s", dataset.prefix)
    elif saved.fingerprint != record.fingerprint:
        raise UserError(f"dataset {dataset.prefix} was made with tokenizer {record.tokenizer} (fingerprint "
                        f"{record.fingerprint[:12]}), the model was trained with another ({str(saved.fingerprint)[:12]})")
    if record.vocab_size > (saved.model.vocab_size or 0):
        raise UserError(f"dataset {dataset.prefix} was made with a vocabulary of {record.vocab_size}, larger than the model's "
                        f"{saved.model.vocab_size}")


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it, no number for a loss that is none."""
    return math.inf if loss > 700 else math.exp(loss)


def bits_per_byte(losses: dict[str, float], dataset: IndexedDataset) -> dict[str, float] | None:
    """Losses in bits per byte of text, which do not depend on the tokenizer; None where the dataset does not know its bytes.

    Nats per token, times tokens per byte, divided by ln 2. Tokens per byte are of the whole dataset, as its record counts
    them: all tokens, those that end documents too, to the documents' UTF-8 bytes before tokenizing.
    """
    if dataset.record is None or not dataset.record.text_bytes:
        return None
    tokens_per_byte = dataset.record.tokens / dataset.record.text_bytes
    return {mode: loss * tokens_per_byte / math.log(2) for mode, loss in losses.items()}
