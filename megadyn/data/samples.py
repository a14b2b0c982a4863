"""Fixed-length samples, cut from an endless stream whose order depends on the seed alone.

The stream of epoch e is the sequences of a split, in an order drawn from (seed, e). Sample k of the epoch is
positions kL to kL + L of that stream, both included: L inputs and the token after each. A stream of T tokens gives
n = (T - 1) // L samples; its last (T - 1) % L tokens are left out. Within the epoch the samples come in another
order drawn from (seed, e). Sample s of the run belongs to epoch s // n. So which tokens sample s holds depends
neither on the length of the run nor on how many ranks share it.
"""

import hashlib
import io
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megadyn.data.files import os_errors_named, temporary_beside
from megadyn.data.indexed import IndexedDataset
from megadyn.errors import UserError

Indices = NDArray[np.int64]

LAYOUT = 1
"""Part of every cache key; raised whenever the same inputs are to give other samples."""
SPLIT, SEQUENCES, SAMPLES = range(3)
"""What a random order is for; keeps orders of one seed apart."""


class Epoch(NamedTuple):
    """The index of one epoch. Field order is the order of `SampleSet._build`."""

    sequences: Indices  # [S]         sequences of the stream, in its order
    places: Indices     # [n + 1, 2]  position kL of the stream: place in `sequences`, offset in tokens
    order: Indices      # [n]         the samples, in the order of reading


class SampleSet:
    """Samples of `sequence_length` + 1 tokens from some documents of a dataset.

    `len()` is the number in one epoch. Shuffled, the samples go on for ever; unshuffled, they are one pass in the
    order of the file. The indices are kept in `cache_dir` (PREFIX.cache by default), under a key of all that they
    depend on; any number of processes may build one at the same time.
    """

    def __init__(self, dataset: IndexedDataset, *, sequence_length: int, seed: int, documents: Indices | None = None,
                 shuffle: bool = True, cache_dir: str | Path | None = None) -> None:
        """`documents`: the split, all documents by default. `UserError` if it is too short for one sample."""
        self.dataset, self.sequence_length, self.seed, self.shuffle = dataset, sequence_length, seed, shuffle
        if documents is None:
            documents = np.arange(dataset.num_documents)
        self.sequences = sequences_of(dataset, documents)
        self.num_tokens = int(dataset.sizes[self.sequences].sum(dtype=np.int64))
        self._samples = (self.num_tokens - 1) // sequence_length
        if self._samples < 1:
            raise UserError(f"dataset {dataset.prefix}: the {self.num_tokens} tokens of {len(documents)} documents are too few "
                            f"for one sample of sequence length {sequence_length}, which takes {sequence_length + 1}")
        self.cache_dir = Path(f"{dataset.prefix}.cache" if cache_dir is None else cache_dir)
        self.key = content_key(dataset.index_path, LAYOUT, sequence_length, seed, shuffle, documents)
        self._epoch = lru_cache(maxsize=2)(self._load)      # a batch may reach into the next epoch

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, s: int) -> Indices:
        """Tokens [L + 1] of sample `s`, counted from the start of the run."""
        if s < 0 or (not self.shuffle and s >= len(self)):
            raise IndexError(f"sample {s} of {len(self)}")
        epoch = self._epoch(s // len(self))
        k = epoch.order[s % len(self)]
        (first, skip), (last, keep) = epoch.places[k:k + 2].tolist()
        run = epoch.sequences[first:last + 1]
        begins, ends = self.dataset.starts[run], self.dataset.starts[run + 1]
        ends[-1] = begins[-1] + keep + 1
        begins[0] += skip
        tokens = self.dataset.tokens
        parts = [tokens[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        return np.concatenate(parts, dtype=np.int64)

    def __iter__(self) -> Iterator[Indices]:
        """The samples of one epoch."""
        return (self[s] for s in range(len(self)))

    def _load(self, number: int) -> Epoch:
        """The index of one epoch, from the cache or built into it."""
        shapes = ((len(self.sequences),), (len(self) + 1, 2), (len(self),))
        paths = [self.cache_dir / f"{self.key}-{number}-{name}.npy" for name in Epoch._fields]
        found = [load_array(path, shape) for path, shape in zip(paths, shapes, strict=True)]
        arrays = [array for array in found if array is not None]
        if len(arrays) < len(paths):
            arrays = list(self._build(number))
            with os_errors_named(self.cache_dir):
                self.cache_dir.mkdir(parents=True, exist_ok=True)
                for path, array in zip(paths, arrays, strict=True):
                    save_array(path, array)
        return Epoch(*arrays)

    def _build(self, number: int) -> Epoch:
        sequences, order = self.sequences, np.arange(len(self))
        if self.shuffle:
            sequences = random_order(self.seed, SEQUENCES, number).permutation(sequences)
            order = random_order(self.seed, SAMPLES, number).permutation(order)
        return Epoch(sequences, sample_places(self.dataset.sizes[sequences], self.sequence_length), order)


def split_documents(dataset: IndexedDataset, validation_fraction: float, seed: int) -> tuple[Indices, Indices]:
    """(training documents, validation documents): disjoint, in the order of the file, drawn from `seed`.

    At least one document each; `UserError` if there are fewer than two. A fraction of 0 keeps none for validation.
    """
    count = dataset.num_documents
    if validation_fraction == 0:
        return np.arange(count), np.empty(0, np.int64)
    if count < 2:
        raise UserError(f"dataset {dataset.prefix} has {count} document, which cannot be split into training and validation; "
                        f"name a separate validation set, or a validation fraction of 0")
    held_out = min(max(1, round(count * validation_fraction)), count - 1)
    order = random_order(seed, SPLIT).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def random_order(*what: int) -> np.random.Generator:
    return np.random.default_rng(what)


def sequences_of(dataset: IndexedDataset, documents: Indices) -> Indices:
    """All sequences of `documents`, in order."""
    first = dataset.document_index[documents]
    counts = dataset.document_index[documents + 1] - first
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(counts.sum())


def sample_places(sizes: NDArray[np.int32], sequence_length: int) -> Indices:
    """Where each sample begins, and the last one ends, in a stream of sequences of these `sizes` [S].

    Row k of [n + 1, 2] is stream position k * sequence_length: which sequence holds it, and its offset there in
    tokens. Sample k is from row k to row k + 1, both included.
    """
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    samples = (int(starts[-1]) - 1) // sequence_length
    positions = np.arange(samples + 1) * sequence_length
    place = np.searchsorted(starts, positions, side="right") - 1    # right: past sequences of no tokens
    return np.stack([place, positions - starts[place]], axis=1)


def content_key(index_path: Path, *parts: Any) -> str:
    """Hash of a dataset's index and of `parts`: equal where the samples are."""
    with index_path.open("rb") as index:
        digest = hashlib.file_digest(index, "sha256")
    for part in parts:
        digest.update(repr(part).encode() if not isinstance(part, np.ndarray) else np.ascontiguousarray(part).tobytes())
        digest.update(b";")
    return digest.hexdigest()[:24]


def load_array(path: Path, shape: tuple[int, ...]) -> Indices | None:
    """The cached array, memory-mapped; None if it is missing or is not of this shape and type.

    The header is compared, not parsed: numpy's parser meets a damaged one with warnings and errors of many kinds.
    """
    header = npy_header(shape)
    try:
        with path.open("rb") as file:
            sound = file.read(len(header)) == header
        if not sound or path.stat().st_size != len(header) + 8 * math.prod(shape):
            return None
        return np.asarray(np.memmap(path, "<i8", mode="r", offset=len(header), shape=shape))
    except OSError:
        return None


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Start of a `.npy` file that holds int64 numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return header.getvalue()


def save_array(path: Path, array: Indices) -> None:
    """Appears under `path` complete, whoever else writes it at the same time."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(npy_header(array.shape) + array.astype("<i8").tobytes())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
