"""The range of a dataset's token ids: computed once, then cached next to the sample indices.

An id beyond the model's embedding would otherwise be noticed late (an exception in the embedding) or never.
"""

import json
from pathlib import Path
from typing import NamedTuple

from megadyn.data.indexed import IndexedDataset, files_of
from megadyn.data.samples import content_key
from megadyn.errors import UserError
from megadyn.files import os_errors_named, temporary_beside
from megadyn.log import log
from megadyn.progress import BYTES, Bar

CHUNK_TOKENS = 2**20
"""Tokens read at once; few enough to stay in the CPU cache between computing minimum and maximum."""
SLOW_BYTES = 2**33
"""Scans of more than this are announced in the log."""


class IdRange(NamedTuple):
    """The smallest and the largest token id; (0, -1) for a dataset without tokens."""

    smallest: int
    largest: int


def id_range(dataset: IndexedDataset, cache_dir: str | Path | None = None) -> IdRange:
    """The range of all ids in `dataset`, from the cache if the `.bin` still has the same size and modification time.

    `cache_dir` is PREFIX.cache by default; if it is not writable, each start reads all tokens. Any number of processes
    may do this at the same time. A damaged entry is replaced.
    """
    tokens_file = files_of(dataset.prefix)["bin"]
    folder = Path(f"{dataset.prefix}.cache" if cache_dir is None else cache_dir)
    with os_errors_named(tokens_file):
        state = tokens_file.stat()
    key = content_key("ids", str(tokens_file.resolve()), state.st_size, state.st_mtime_ns, dataset.dtype.str)
    entry = folder / f"{key}.ids"
    if (found := _read(entry)) is not None:
        return found
    scanned = _scan(dataset, state.st_size)
    temporary = temporary_beside(entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(scanned._asdict()))
            temporary.replace(entry)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # read-only data can still be used for evaluation
        log.info(
            "the range of token ids of %s cannot be cached (%s: %s)",
            dataset.prefix,
            folder,
            error.strerror,
        )
    return scanned


def _read(entry: Path) -> IdRange | None:
    """The cached range; None if there is none or it is damaged."""
    try:
        content = json.loads(entry.read_bytes())
    except OSError:
        return None
    except ValueError:
        content = None
    if (
        isinstance(content, dict)
        and sorted(content) == ["largest", "smallest"]
        and all(isinstance(value, int) for value in content.values())
    ):
        return IdRange(**content)
    log.warning("%s is damaged and will be rebuilt", entry)
    return None


def _scan(dataset: IndexedDataset, size: int) -> IdRange:
    if size > SLOW_BYTES:
        log.info("dataset %s: reading its %.0f GB once for the largest token id", dataset.prefix, size / 1e9)
    smallest, largest = 0, -1
    with Bar(f"reading {dataset.prefix}", dataset.num_tokens * dataset.dtype.itemsize, BYTES) as bar:
        for first in range(0, dataset.num_tokens, CHUNK_TOKENS):
            chunk = dataset.tokens[first : first + CHUNK_TOKENS]
            largest = max(largest, int(chunk.max()))
            if dataset.dtype.kind == "i":  # an unsigned type has no ids below 0
                smallest = min(smallest, int(chunk.min()))
            bar.add(chunk.nbytes)
    return IdRange(smallest, largest)


def check_ids(dataset: IndexedDataset, vocab_size: int, cache_dir: str | Path | None = None) -> IdRange:
    """The range of ids; raises `UserError` if an id is negative or not below the model's `vocab_size`."""
    found = id_range(dataset, cache_dir)
    if found.largest >= vocab_size:
        raise UserError(
            f"dataset {dataset.prefix}: its largest token id is {found.largest}, but the model's vocabulary has "
            f"{vocab_size} ids (0 to {vocab_size - 1}); it was probably made with another tokenizer than the one "
            "configured, or model.vocab_size is too small"
        )
    if found.smallest < 0:
        raise UserError(
            f"dataset {dataset.prefix}: it holds the negative token id {found.smallest}; its {dataset.dtype} "
            "tokens were probably written as a wider or unsigned type, or the file is damaged"
        )
    return found
