"""Megatron-LM's indexed format, byte for byte: PREFIX.bin holds the tokens, PREFIX.idx where they belong.

# PREFIX.idx, little-endian, no padding, S sequences in D documents:
#   header      magic 9s | version u64 | dtype code u8 | S u64 | D + 1 u64
#   lengths     [S]      i32  tokens in each sequence, 0 allowed
#   offsets     [S]      i64  byte offset of each sequence in PREFIX.bin
#   boundaries  [D + 1]  i64  document k is sequences boundaries[k] to boundaries[k + 1] - 1, maybe none
# PREFIX.bin: the tokens, back to back.

Multimodal datasets add [S] i8 of modes, which nothing in the header announces; they are refused.
"""

import os
import struct
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadyn.data.record import Record, read_record
from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.tokenization.tokenizer import TokenArray, Tokenizer

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Token type by dtype code. 6 and 7 are float64 and float32, which are no tokens."""
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
UINT16_VOCAB_LIMIT = 65500
"""Vocabularies from here on are stored as int32; Megatron-LM's bound, a little under 2^16."""
LONGEST_SEQUENCE = 2**31 - 1
COPY_BYTES = 2**20
CHUNK_SEQUENCES = 2**18
"""Sequences that are checked at once: few enough to stay in the processor's cache."""


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    return DTYPE_OF_CODE[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPE_OF_CODE[4]


def files_of(prefix: Path) -> dict[str, Path]:
    """Every file of a dataset, in the order in which they are published: with the `.idx`, it is complete."""
    return {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "json", "idx")}


class IndexedDataset:
    """A dataset on disk, read through memory maps, or by plain reads on file systems where maps are slow.

    Opening checks the index against itself and the file sizes, so that no later read can leave the file. `UserError`
    names the file and the mismatch. Token values are not read (see `inspection.verify`).
    """

    def __init__(self, prefix: str | Path, *, mmap: bool = True) -> None:
        self.prefix = Path(prefix)
        bin_path, record_path, self.index_path = files_of(self.prefix).values()
        for path in (self.index_path, bin_path):
            if not path.is_file():
                raise UserError(f"dataset {self.prefix}: no file {path}")
        with os_errors_named(self.prefix):
            self._open(bin_path, record_path, mmap)

    def _open(self, bin_path: Path, record_path: Path, mmap: bool) -> None:
        self.dtype, sequences, boundaries = read_header(self.index_path)
        index = (
            np.memmap(self.index_path, np.uint8, mode="r") if mmap else np.fromfile(self.index_path, np.uint8)
        )
        at_offsets, at_boundaries = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        self.sizes: NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, HEADER.size)
        """Tokens in each sequence [S]."""
        self._offsets: NDArray[np.int64] = np.frombuffer(index, "<i8", sequences, at_offsets)
        self.document_index: NDArray[np.int64] = np.frombuffer(index, "<i8", boundaries, at_boundaries)
        """Boundaries of the documents in sequences [D + 1]."""
        self.num_tokens = check_offsets(self.index_path, self.sizes, self._offsets, self.dtype.itemsize)
        check_boundaries(self.index_path, self.document_index, sequences)
        self.num_documents = boundaries - 1
        check_tokens(bin_path, self.dtype, self.num_tokens)
        self.tokens: TokenArray | FileTokens = (
            map_tokens(bin_path, self.dtype) if mmap else FileTokens(bin_path, self.dtype, self.num_tokens)
        )
        """All tokens in file order; a slice of it is an array."""
        self.record: Record | None = read_record(record_path)
        check_record(record_path, self.record, self)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    def __getitem__(self, i: int) -> TokenArray:
        """Tokens of sequence `i`, in the dtype of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        begin = int(self.starts(np.array(i)))
        return self.tokens[begin : begin + int(self.sizes[i])]

    def document(self, k: int) -> TokenArray:
        """Tokens of document `k`, its sequences joined."""
        if not 0 <= k < self.num_documents:
            raise IndexError(f"document {k} of {self.num_documents}")
        first, end = self.document_index[k : k + 2].tolist()
        if first == end:
            return np.empty(0, self.dtype)
        begin, last = self.starts(np.array([first, end - 1])).tolist()
        return self.tokens[begin : last + int(self.sizes[end - 1])]

    def starts(self, sequences: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Where in `tokens` each of `sequences` begins."""
        starts: NDArray[np.int64] = self._offsets[sequences] // self.dtype.itemsize
        return starts


class FileTokens:
    """The tokens of a `.bin` by plain reads, which any number of threads may do at once. Slices give arrays."""

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int) -> None:
        self._path, self._dtype, self._count = path, dtype, count
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, wanted: slice) -> TokenArray:
        """Tokens of a slice of step 1; `UserError` if the file became shorter since it was opened."""
        first, end, step = wanted.indices(self._count)
        if step != 1:
            raise ValueError(f"a slice of step {step}")
        tokens = np.empty(max(0, end - first), self._dtype)
        left, offset = tokens.view(np.uint8).data, first * self._dtype.itemsize
        while left:
            with os_errors_named(self._path):
                got = os.preadv(self._file, [left], offset)
            if not got:
                raise UserError(f"{self._path}: ends at byte {offset}; it became shorter while it was read")
            left, offset = left[got:], offset + got
        return tokens


def read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """(token dtype, sequences, boundaries) of a `.idx` whose size agrees with them."""
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path}: not the index of a dataset (it does not begin with {MAGIC!r})")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != VERSION:
        raise UserError(f"{path}: version {version} of the index format; only {VERSION} is known")
    if code not in DTYPE_OF_CODE:
        raise UserError(
            f"{path}: dtype code {code} is not an integer type for tokens (known: "
            f"{', '.join(map(str, DTYPE_OF_CODE))})"
        )
    want = HEADER.size + 12 * sequences + 8 * boundaries
    have = path.stat().st_size
    if have == want + sequences != want:
        raise UserError(
            f"{path}: a multimodal dataset (it holds a mode for each sequence); only text is supported"
        )
    if have != want:
        raise UserError(
            f"{path}: {have} bytes, but its header describes {want} ({sequences} sequences, "
            f"{boundaries} document boundaries); was it cut short?"
        )
    return DTYPE_OF_CODE[code], sequences, boundaries


def check_offsets(path: Path, sizes: NDArray[np.int32], offsets: NDArray[np.int64], itemsize: int) -> int:
    """Number of tokens, the sum of `sizes` [S], once `offsets` [S] says the same in bytes."""
    tokens = 0
    for first in range(0, len(sizes), CHUNK_SEQUENCES):
        part = sizes[first : first + CHUNK_SEQUENCES]
        if part.min() < 0:
            raise UserError(f"{path}: sequence {first + int((part < 0).argmax())} has a negative length")
        ends = np.cumsum(part, dtype=np.int64) + tokens
        starts = (ends - part) * itemsize
        wrong = offsets[first : first + CHUNK_SEQUENCES] != starts
        if wrong.any():
            i = int(wrong.argmax())
            raise UserError(
                f"{path}: sequence {first + i} is at byte {offsets[first + i]}, but the lengths before it end at "
                f"{starts[i]}"
            )
        tokens = int(ends[-1])
    return tokens


def check_boundaries(path: Path, boundaries: NDArray[np.int64], sequences: int) -> None:
    if (
        not boundaries.size
        or boundaries[0] != 0
        or boundaries[-1] != sequences
        or (boundaries[1:] < boundaries[:-1]).any()
    ):
        raise UserError(f"{path}: its document boundaries do not rise from 0 to the {sequences} sequences")


def check_tokens(path: Path, dtype: np.dtype[Any], count: int) -> None:
    have, want = path.stat().st_size, count * dtype.itemsize
    if have != want:
        raise UserError(
            f"{path}: {have} bytes, but its index describes {want} ({count} tokens of {dtype}); was it cut short?"
        )


def map_tokens(path: Path, dtype: np.dtype[Any]) -> TokenArray:
    if not path.stat().st_size:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype, mode="r"))  # plain array: slices of np.memmap are slow to make


def check_record(path: Path, record: Record | None, dataset: IndexedDataset) -> None:
    have = (dataset.num_documents, len(dataset), dataset.num_tokens)
    if record and (want := (record.documents, record.sequences, record.tokens)) != have:
        raise UserError(
            f"{path}: describes (documents, sequences, tokens) = {want}, but the index {have}; "
            f"it belongs to another dataset"
        )


def check_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """Raises `UserError` if `tokenizer` cannot be the one that made `dataset`."""
    record = dataset.record
    if record and record.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"dataset {dataset.prefix} was made with tokenizer {record.tokenizer} ({record.vocab_size} ids, "
            f"fingerprint {record.fingerprint[:12]}), not with {tokenizer.name} ({tokenizer.vocab_size} ids, "
            f"fingerprint {tokenizer.fingerprint[:12]}); give the tokenizer it was made with, or preprocess again"
        )
    if tokenizer.vocab_size - 1 > np.iinfo(dataset.dtype).max:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, more than the {dataset.dtype} "
            f"of dataset {dataset.prefix} can hold; the dataset was made with another tokenizer"
        )
