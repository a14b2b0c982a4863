"""Shows what is in a dataset, and verifies that it is what was written."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megadyn.data.indexed import IndexedDataset
from megadyn.errors import UserError
from megadyn.progress import BYTES, Bar

CHUNK_TOKENS = 2**22


@dataclass(frozen=True)
class Verified:
    sha256: str
    smallest_id: int | None
    largest_id: int | None


def length_histogram(sizes: NDArray[np.int32]) -> dict[str, int]:
    """Number of sequences by length in tokens: `0`, `1`, `2-3`, `4-7`, ...; empty ranges are left out."""
    bits = np.frexp(sizes.astype(np.float64))[1]  # length in [2^(bits - 1), 2^bits)
    return {bin_name(i): count for i, count in enumerate(np.bincount(bits).tolist()) if count}


def bin_name(bits: int) -> str:
    return str(bits) if bits < 2 else f"{2 ** (bits - 1)}-{2**bits - 1}"


def verify(dataset: IndexedDataset, vocab_size: int | None) -> Verified:
    """Reads every token; offsets and sizes were checked when the dataset was opened.

    Raises `UserError` if an id is negative or not below `vocab_size` (None: unknown), or if the token stream differs
    from the one whose hash the dataset records.
    """
    stream, low, high = hashlib.sha256(), [], []
    with Bar(f"verifying {dataset.prefix}", dataset.num_tokens * dataset.dtype.itemsize, BYTES) as bar:
        for first in range(0, dataset.num_tokens, CHUNK_TOKENS):
            chunk = dataset.tokens[first : first + CHUNK_TOKENS]
            stream.update(chunk.tobytes())
            low.append(int(chunk.min()))
            high.append(int(chunk.max()))
            bar.add(chunk.nbytes)
    found = Verified(stream.hexdigest(), min(low, default=None), max(high, default=None))
    if found.smallest_id is not None and found.smallest_id < 0:
        raise UserError(f"{dataset.prefix}.bin: token id {found.smallest_id} is negative")
    if vocab_size is not None and found.largest_id is not None and found.largest_id >= vocab_size:
        raise UserError(
            f"{dataset.prefix}.bin: token id {found.largest_id} is not below the vocabulary of {vocab_size}"
        )
    if dataset.record and dataset.record.sha256 != found.sha256:
        raise UserError(
            f"{dataset.prefix}.bin: its tokens changed since they were written (sha256 {found.sha256[:12]}..., "
            f"recorded {dataset.record.sha256[:12]}...)"
        )
    return found
