"""Writes the documents of many files in a random order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megadyn.data.indexed import map_tokens
from megadyn.data.indexed_writer import IndexedWriter

CHUNK_TOKENS = 2**22


def add_shuffled(writer: IndexedWriter, parts: Sequence[tuple[Path, NDArray[np.int32]]], seed: int) -> None:
    """Adds the documents of `parts` (a file of tokens, and the lengths of its documents) in a random order.

    The order is `numpy.random.default_rng(seed).permutation`. Needs 40 bytes of memory per document.
    """
    lengths = np.concatenate([np.empty(0, np.int32), *(lengths for _, lengths in parts)])
    part_of = np.repeat(np.arange(len(parts)), [len(lengths) for _, lengths in parts])
    starts = np.concatenate(
        [np.empty(0, np.int64), *(np.cumsum(lengths, dtype=np.int64) - lengths for _, lengths in parts)]
    )
    maps = [map_tokens(path, writer.dtype) for path, _ in parts]
    order = np.random.default_rng(seed).permutation(len(lengths))
    chunk_of = np.cumsum(lengths[order], dtype=np.int64) // CHUNK_TOKENS
    for chunk in np.split(order, np.flatnonzero(np.diff(chunk_of)) + 1):
        begins = starts[chunk]
        texts = [
            maps[part][begin:end]
            for part, begin, end in zip(
                part_of[chunk].tolist(), begins.tolist(), (begins + lengths[chunk]).tolist(), strict=True
            )
        ]
        if texts:
            writer.add(np.concatenate(texts), lengths[chunk][lengths[chunk] > 0], lengths[chunk] > 0)
