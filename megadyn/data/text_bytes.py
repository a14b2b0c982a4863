"""Losses in bits per byte of text, which are independent of the tokenizer."""

import math

from megadyn.data.blend import Blend
from megadyn.data.indexed import IndexedDataset
from megadyn.data.samples import Samples, SampleSet


def bytes_per_token(dataset: IndexedDataset) -> float | None:
    """Of the whole dataset, from its record: its documents' UTF-8 bytes before tokenizing, divided by all its tokens,
    including those that end documents. None if it does not record its bytes."""
    record = dataset.record
    return record.text_bytes / record.tokens if record is not None and record.text_bytes else None


def mean_bytes_per_token(samples: Samples) -> float | None:
    """Over the datasets of the samples, by their shares in a blend; None if one of them is unknown."""
    if isinstance(samples, SampleSet):
        return bytes_per_token(samples.dataset)
    if not isinstance(samples, Blend):
        return None
    parts = [mean_bytes_per_token(part) for part in samples.sets]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return sum(part * float(share) for part, share in zip(known, samples.schedule.weights, strict=True))


def in_bits_per_byte(losses: dict[str, float], per_token: float) -> dict[str, float]:
    """Losses in nats per token, by routing mode, in bits per byte: loss / (ln 2 * bytes per token)."""
    return {mode: loss / per_token / math.log(2) for mode, loss in losses.items()}
