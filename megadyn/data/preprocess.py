"""Text to an indexed dataset: corpus -> batches of texts -> tokenizer processes -> one writer.

The batches keep their order, so the result does not depend on the number of workers.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megadyn.data.files import os_errors_named, refuse_existing
from megadyn.data.indexed import IndexedWriter, dtype_for, files_of
from megadyn.data.readers import Corpus
from megadyn.data.record import Record
from megadyn.data.tokenizer import TokenArray, Tokenizer, load_tokenizer
from megadyn.errors import UserError

BATCH_CHARACTERS = 2**19
"""Text that one worker takes at a time; bounds the memory, as encodings take some 100 bytes a character."""
BATCHES_PER_WORKER = 2
"""Batches in flight, the one being encoded included."""


class Encoded(NamedTuple):
    """A batch of documents as tokens. A document without tokens has length 0."""

    tokens: TokenArray          # [N]
    lengths: NDArray[np.int64]  # [documents]


def preprocess(corpus: Corpus, tokenizer_path: str | Path, prefix: Path, *, append_eod: bool = False, workers: int = 1,
               overwrite: bool = False) -> Record:
    """Writes PREFIX.bin, .json and .idx: one document per text, with one sequence, or none if it has no tokens.

    `append_eod` ends each document that has tokens with the tokenizer's end-of-document token. With more than one
    worker the tokenizer runs in as many processes. `UserError` if a document cannot be read (see `Corpus`), the
    corpus holds no tokens, a worker dies, or PREFIX exists without `overwrite`; then nothing is written.
    """
    refuse_existing(files_of(prefix).values(), overwrite)
    tokenizer = load_tokenizer(tokenizer_path)
    eod = tokenizer.eod if append_eod else None
    with os_errors_named(prefix), IndexedWriter(prefix, dtype_for(tokenizer.vocab_size)) as writer:
        for tokens, lengths in encode(batches_of(corpus), partial(load_tokenizer, tokenizer_path), eod, workers):
            writer.add(tokens, lengths[lengths > 0], lengths > 0)
        if not writer.num_tokens:
            raise UserError(f"the corpus is empty: no tokens in {writer.num_documents} documents of "
                            f"{', '.join(map(str, corpus.paths))} ({corpus.skipped} skipped)")
        record = Record(
            tokenizer=tokenizer.name, fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod_or_none, append_eod=append_eod, documents=writer.num_documents,
            sequences=writer.num_sequences, tokens=writer.num_tokens, sha256=writer.sha256,
            skipped=corpus.skipped, source=[str(path) for path in corpus.paths])
        writer.finish(record)
    return record


def batches_of(texts: Iterable[str], characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Lists of consecutive texts, each closed once it holds `characters` or more."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(batches: Iterable[list[str]], load: Callable[[], Tokenizer], eod: int | None, workers: int) -> Iterator[Encoded]:
    """Each batch encoded, in order, in this process or in `workers` others, which get their tokenizer from `load`.

    Reads at most `BATCHES_PER_WORKER` batches a worker ahead. What a worker raises is raised here; a worker that
    dies raises `UserError`.
    """
    if workers <= 1:
        tokenizer = load()
        yield from (encode_batch(tokenizer, batch, eod) for batch in batches)
        return
    # Not fork: a tokenizer that has run holds threads, which a forked process would wait for in vain.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=start_worker, initargs=(load,))
    in_flight: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            in_flight.append(pool.submit(encode_in_worker, batch, eod))
            if len(in_flight) >= workers * BATCHES_PER_WORKER:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a tokenizer process died (out of memory?); fewer --workers take less") from error
    finally:
        pool.shutdown(cancel_futures=True)


def encode_batch(tokenizer: Tokenizer, texts: list[str], eod: int | None) -> Encoded:
    arrays = tokenizer.encode_batch(texts)
    if eod is not None:
        arrays = [np.append(array, np.int32(eod)) if array.size else array for array in arrays]
    return Encoded(np.concatenate(arrays), np.array([array.size for array in arrays], np.int64))


worker_tokenizer: Tokenizer     # of a worker process, set once when it starts


def start_worker(load: Callable[[], Tokenizer]) -> None:
    global worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"      # the processes are the parallelism
    worker_tokenizer = load()


def encode_in_worker(texts: list[str], eod: int | None) -> Encoded:
    return encode_batch(worker_tokenizer, texts, eod)
