"""Loss of a saved model on a dataset, in nats per token and bits per byte."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megadyn.data.batches import read_batch
from megadyn.data.ends import check_marked
from megadyn.data.indexed import IndexedDataset
from megadyn.data.largest import check_ids
from megadyn.data.samples import SampleSet
from megadyn.data.text_bytes import bytes_per_token, in_bits_per_byte
from megadyn.errors import UserError
from megadyn.evaluation.saved import Saved, load_network, open_saved
from megadyn.log import log
from megadyn.network import routed_layers, set_routing_mode
from megadyn.progress import each


@torch.no_grad()
def evaluate(
    path: Path,
    data: Path,
    *,
    modes: Sequence[str],
    samples: int | None = None,
    batch_size: int = 8,
    sequence_length: int | None = None,
) -> dict[str, Any]:
    """Mean next-token loss over `data`, in file order, under each routing mode.

    Args:
        modes: any of `topk` and `causal`.
        samples: only this many, from the start. sequence_length: by default the run's own.

    Returns:
        The loss per mode in nats per token; `tokens` (predicted, per mode); `perplexity` and `bits_per_byte` by mode
        (see their functions); for a routed model `routed_fraction` of the last mode and `causal_agreement`, means over
        its routed layers.
    """
    log.info("loading %s", path)
    saved = open_saved(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(saved, device)
    dataset = IndexedDataset(data)
    check_dataset(dataset, saved)
    length = sequence_length or saved.sequence_length
    chosen = SampleSet(dataset, sequence_length=length, seed=0, shuffle=False)
    count = min(len(chosen), samples or len(chosen))
    log.info("scoring %s samples of %s tokens on %s", f"{count:,}", f"{length:,}", device)
    routed = routed_layers(network)
    result: dict[str, Any] = {}
    for mode in modes:
        set_routing_mode(routed, mode)
        total = torch.zeros((), dtype=torch.float64, device=device)
        batches = range(0, count, batch_size)
        for first in each(batches, f"scoring, {mode} routing", len(batches)):
            size = min(batch_size, count - first)
            tokens, labels = (
                torch.from_numpy(part).to(device) for part in read_batch(chosen, range(first, first + size))
            )
            total += network(tokens, labels).double() * size
        result[mode] = float(total) / count
        statistics = [layer.monitor.read() for layer in routed]
        for name in ("routed_fraction", "causal_agreement"):
            values = [float(record[name]) for record in statistics if name in record]
            if values:
                result[name] = sum(values) / len(values)
    losses = {mode: result[mode] for mode in modes}
    return result | {
        "tokens": count * length,
        "perplexity": {mode: perplexity(loss) for mode, loss in losses.items()},
        "bits_per_byte": bits_per_byte(losses, dataset),
    }


def check_dataset(dataset: IndexedDataset, saved: Saved) -> None:
    """Raises UserError if the tokens do not fit the model, or documents end with another token than in training."""
    assert saved.model.vocab_size is not None
    check_ids(dataset, saved.model.vocab_size)
    if saved.eod is not None:
        check_marked(dataset, saved.eod)
    if (record := dataset.record) is None:
        return
    if saved.fingerprint is None:
        log.warning(
            "the model does not record its tokenizer, so it was not compared with that of %s",
            dataset.prefix,
        )
    elif saved.fingerprint != record.fingerprint:
        raise UserError(
            f"dataset {dataset.prefix} was made with tokenizer {record.tokenizer} (fingerprint "
            f"{record.fingerprint[:12]}), but the model was trained with another ({str(saved.fingerprint)[:12]})"
        )
    if record.vocab_size > (saved.model.vocab_size or 0):
        raise UserError(
            f"dataset {dataset.prefix} was made with a vocabulary of {record.vocab_size}, larger than the model's "
            f"{saved.model.vocab_size}"
        )


def perplexity(loss: float) -> float:
    """exp(loss); infinity on overflow, NaN for a NaN loss."""
    return math.inf if loss > 700 else math.exp(loss)


def bits_per_byte(losses: dict[str, float], dataset: IndexedDataset) -> dict[str, float] | None:
    """Losses in bits per byte of text, which are independent of the tokenizer; None if the dataset does not record its bytes.

    Bytes per token are those of the whole dataset (`text_bytes.bytes_per_token`).
    """
    per_token = bytes_per_token(dataset)
    return None if per_token is None else in_bits_per_byte(losses, per_token)
