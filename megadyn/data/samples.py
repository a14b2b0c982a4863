"""Fixed-length samples, cut from an endless stream whose order depends only on the seed.

The stream of epoch e consists of the sequences of a split, in an order drawn from (seed, e). Sample k of the epoch is
positions kL to kL + L of that stream, inclusive: L inputs and the token after each. A stream of T tokens gives
n = (T - 1) // L samples; its last (T - 1) % L tokens are unused. The samples of an epoch are used in another order drawn from
(seed, e). Sample s of the run belongs to epoch s // n. So the tokens of sample s depend neither on the length of the
run nor on the number of ranks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megadyn.data.indexed import IndexedDataset
from megadyn.errors import UserError
from megadyn.files import temporary_beside
from megadyn.log import log
from megadyn.progress import Bar

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

LAYOUT = 1
"""Part of every cache key; increased whenever the same inputs should give other samples."""
SPLIT, SEQUENCES, SAMPLES = range(3)
"""What a random order is for; keeps orders of one seed apart."""
SLOW_INDEX = 10**7
"""Sequences and samples of an epoch; putting more of them in order takes seconds, and is announced."""
DIGEST_BYTES = hashlib.sha256().digest_size


class Samples(Protocol):
    """Data that can be trained on: one set of samples, or a blend of several."""

    key: str
    """Equal for equal samples in the same order."""
    sequence_length: int
    """L; a sample is L + 1 tokens."""

    def __len__(self) -> int:
        """Number of samples before any of them repeats."""

    def take(self, ids: Sequence[int] | Indices) -> Indices:
        """Tokens [B, L + 1] of the samples with these numbers, counted from the start of the run."""


class Epoch(NamedTuple):
    """The index of one epoch; all arrays have the same integer type. Field order is the order in the cache."""

    sequences: NDArray[Any]  # [S]         sequences of the stream, in its order
    places: NDArray[Any]  # [n + 1, 2]  position kL of the stream: place in `sequences`, offset in tokens
    order: NDArray[Any]  # [n]         the samples, in the order of use


class SampleSet:
    """Samples of `sequence_length` + 1 tokens from some documents of a dataset.

    `len()` is the number in one epoch. Shuffled samples go on forever. The index of each epoch is cached in `cache_dir`
    (PREFIX.cache by default), under a key of everything that it depends on; any number of processes may build it at the
    same time. Unshuffled samples are one pass in file order, which needs no cache.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        *,
        sequence_length: int,
        seed: int,
        documents: Mask | None = None,
        shuffle: bool = True,
        cache_dir: str | Path | None = None,
    ) -> None:
        """`documents` [D]: mask of the split (default: all). Raises `UserError` if it is too short for one sample."""
        self.dataset, self.sequence_length, self.seed, self.shuffle = dataset, sequence_length, seed, shuffle
        self._chosen = None if documents is None or documents.all() else sequences_of(dataset, documents)
        sizes = dataset.sizes if self._chosen is None else dataset.sizes[self._chosen]
        self.num_tokens = int(sizes.sum(dtype=np.int64))
        self._samples = (self.num_tokens - 1) // sequence_length
        if self._samples < 1:
            count = dataset.num_documents if documents is None else int(documents.sum())
            raise UserError(
                f"dataset {dataset.prefix}: the {self.num_tokens} tokens of {count} documents are too few "
                f"for one sample of sequence length {sequence_length}, which needs {sequence_length + 1}"
            )
        largest = max(len(sizes), self._samples)
        self._shapes = ((len(sizes),), (self._samples + 1, 2), (self._samples,))
        self._type = np.dtype("<i4" if largest < 2**31 else "<i8")
        self.cache_dir = Path(f"{dataset.prefix}.cache" if cache_dir is None else cache_dir)
        self.key = content_key(LAYOUT, sequence_length, seed, shuffle, dataset.sizes, self._chosen)
        self._epoch = lru_cache(maxsize=2)(self._load)  # two, because a batch may extend into the next epoch

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, s: int) -> Indices:
        """Tokens [L + 1] of sample `s`, counted from the start of the run."""
        row: Indices = self.take([s])[0]
        return row

    def __iter__(self) -> Iterator[Indices]:
        """The samples of one epoch."""
        return (self[s] for s in range(len(self)))

    def take(self, ids: Sequence[int] | Indices) -> Indices:
        """Tokens [B, L + 1] of the samples `ids` [B], counted from the start of the run."""
        rows = np.empty((len(ids), self.sequence_length + 1), np.int64)
        tokens = self.dataset.tokens
        for row, s in zip(rows, np.asarray(ids, np.int64).tolist(), strict=True):
            row[:] = np.concatenate([tokens[part] for part in self._parts(s)])
        return rows

    def places(self, s: int) -> Indices:
        """Where in the dataset's file the tokens [L + 1] of sample `s` are, counted in tokens."""
        return np.concatenate([np.arange(part.start, part.stop) for part in self._parts(s)])

    def _parts(self, s: int) -> list[slice]:
        """The parts of the file that sample `s` is put together from, counted from the start of the run."""
        number, place = divmod(s, self._samples)
        if s < 0 or (number and not self.shuffle):
            raise IndexError(f"sample {s} of {self._samples}")
        epoch = self._epoch(number)
        k = int(epoch.order[place])
        (first, skip), (last, keep) = epoch.places[k : k + 2].tolist()
        touched = epoch.sequences[first : last + 1]
        starts = self.dataset.starts(touched)
        begins, ends = starts.tolist(), (starts + self.dataset.sizes[touched]).tolist()
        ends[-1] = begins[-1] + keep + 1
        begins[0] += skip
        return [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]

    def _load(self, number: int) -> Epoch:
        """The index of one epoch, read from the cache or built and cached."""
        if not self.shuffle:
            return self._build(number)
        path = self.cache_dir / f"{self.key}-{number}.index"
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            if (found := self._read(path)) is not None:
                return found
            epoch = self._build(number)
            if self._read(path) is None:  # otherwise another process was faster
                save_arrays(path, epoch)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.cache_dir}: {error.strerror or error}; the order of samples is cached "
                f"there (data.cache names another folder)"
            ) from error
        return epoch

    def _read(self, path: Path) -> Epoch | None:
        """The cached index, memory-mapped; None if there is none or it is damaged."""
        if not path.exists():
            return None
        ends = np.cumsum([np.prod(shape, dtype=np.int64) for shape in self._shapes])
        if path.stat().st_size == DIGEST_BYTES + int(ends[-1]) * self._type.itemsize:
            raw = np.memmap(path, np.uint8, mode="r")
            if hashlib.sha256(raw[DIGEST_BYTES:].data).digest() == raw[:DIGEST_BYTES].tobytes():
                parts = np.split(np.frombuffer(raw, self._type, offset=DIGEST_BYTES), ends[:-1])
                return Epoch(*(part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)))
        log.warning("%s is damaged and will be rebuilt", path)
        return None

    def _build(self, number: int) -> Epoch:
        chosen = np.arange(len(self.dataset)) if self._chosen is None else np.flatnonzero(self._chosen)
        sequences, order = chosen.astype(self._type), np.arange(len(self), dtype=self._type)
        what = f"dataset {self.dataset.prefix}: index of epoch {number + 1}"
        if self.shuffle and len(sequences) + len(order) > SLOW_INDEX:
            log.info("%s: putting %s samples in order", what, f"{len(order):,}")
        with Bar(what, len(sequences) + 2 * len(order)) as bar:
            if self.shuffle:
                random_order(self.seed, SEQUENCES, number).shuffle(sequences)
                bar.add(len(sequences))
                random_order(self.seed, SAMPLES, number).shuffle(order)
                bar.add(len(order))
            places = sample_places(self.dataset.sizes.take(sequences), self.sequence_length)
            bar.reach(bar.total)
        return Epoch(sequences, places.astype(self._type), order)


class Shifted:
    """`samples` from their sample `by` on: sample s is their sample s + `by`. A negative `by` puts them behind samples that are
    not theirs, so that their first one is sample -`by`."""

    def __init__(self, samples: Samples, by: int) -> None:
        self.samples, self.by = samples, by
        self.sequence_length = samples.sequence_length
        self.key = content_key(samples.key, by)

    def __len__(self) -> int:
        return max(0, len(self.samples) - self.by)

    def take(self, ids: Sequence[int] | Indices) -> Indices:
        return self.samples.take(np.asarray(ids, np.int64) + self.by)


def shifted(samples: Samples, by: int) -> Samples:
    return Shifted(samples, by) if by else samples


class Split(NamedTuple):
    """Masks over documents [D], one per purpose: disjoint, and together complete."""

    train: Mask
    validation: Mask
    test: Mask


def split_documents(dataset: IndexedDataset, validation: float, test: float, seed: int) -> Split:
    """Reserves these shares of the documents, drawn from `seed`, for validation and test.

    A share above 0 gives at least one document, and at least one is left for training. Raises `UserError` if there are too few.
    """
    count = dataset.num_documents
    least = 1 + (validation > 0) + (test > 0)
    if least > 1 and count < least:
        raise UserError(
            f"dataset {dataset.prefix} has {count} document{'s' * (count != 1)}, too few for a split into {least}; "
            f"name separate sets (data.validation, data.test), or reserve none (data.split: [1, 0, 0])"
        )
    for_validation = min(max(1, round(count * validation)), count - least + 1) if validation else 0
    for_test = min(max(1, round(count * test)), count - for_validation - 1) if test else 0
    split = Split(np.ones(count, np.bool_), np.zeros(count, np.bool_), np.zeros(count, np.bool_))
    if held_out := for_validation + for_test:
        order = random_order(seed, SPLIT).permutation(count)
        split.train[order[:held_out]] = False
        split.validation[order[:for_validation]] = True
        split.test[order[for_validation:held_out]] = True
    return split


def random_order(*what: int) -> np.random.Generator:
    return np.random.default_rng(what)


def sequences_of(dataset: IndexedDataset, documents: Mask) -> Mask:
    """Which sequences [S] belong to `documents` [D]."""
    return np.repeat(documents, np.diff(dataset.document_index))


def sample_places(sizes: NDArray[np.int32], sequence_length: int) -> Indices:
    """Where each sample begins, and the last one ends, in a stream of sequences of these `sizes` [S].

    Row k of [n + 1, 2] describes stream position k * sequence_length: the sequence that holds it, and the offset in
    that sequence in tokens. Sample k goes from row k to row k + 1, inclusive.
    """
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    samples = (int(starts[-1]) - 1) // sequence_length
    positions = np.arange(samples + 1) * sequence_length
    place = np.searchsorted(starts, positions, side="right") - 1  # right: skips empty sequences
    return np.stack([place, positions - starts[place]], axis=1)


def content_key(*parts: Any) -> str:
    """Hash of `parts`; arrays count by their content."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode()
        )
        digest.update(b";")
    return digest.hexdigest()[:24]


def save_arrays(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    """Writes the sha256 of all arrays, then the arrays. Atomic, even if several processes write `path` at the same time."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(digest.digest())
            for array in arrays:
                file.write(array.data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
