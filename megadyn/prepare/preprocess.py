"""Text to an indexed dataset: corpus -> units -> tokenizer processes -> parts on disk -> one dataset.

A unit is a piece of the corpus that one process reads, encodes and writes by itself. So no text is sent between
processes, and the result does not depend on the number of processes or MPI ranks.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megadyn.data.indexed import dtype_for, files_of
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.record import Record
from megadyn.errors import UserError
from megadyn.files import os_errors_named, refuse_existing
from megadyn.log import log
from megadyn.prepare.parts import Part, Parts, PartWriter, part_name
from megadyn.prepare.progress import Progress
from megadyn.prepare.ranks import POLL_SECONDS, Ranks
from megadyn.prepare.readers import Corpus
from megadyn.prepare.remote import identity_of
from megadyn.prepare.shuffle import add_shuffled
from megadyn.prepare.units import Unit
from megadyn.prepare.workers import in_order
from megadyn.tokenization.gigatoken import with_engine
from megadyn.tokenization.tokenizer import Encoded, Tokenizer, load_tokenizer

BATCH_BYTES = 2**21
"""Text encoded at a time; smaller batches are slower, because of gigatoken's overhead per batch."""
ALONE = Ranks()
NumberedPart = tuple[int, Part]
ALL_SENT = None
"""What other ranks send after their last part."""


def preprocess(
    corpus: Corpus,
    tokenizer_path: str | Path,
    prefix: Path,
    *,
    append_eod: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    engine: str = "auto",
    max_documents: int | None = None,
    shuffle_seed: int | None = None,
    ranks: Ranks = ALONE,
    eod: str | None = None,
) -> Record:
    """Writes PREFIX.bin, .json and .idx: one document per text, with one sequence, or none if it has no tokens.

    `append_eod` ends each non-empty document with the tokenizer's end-of-document token, or with `eod`, a token of its
    vocabulary. `max_documents` takes only the first documents; `shuffle_seed` writes them in a random order with that
    seed. With more than one worker the tokenizer runs in that many processes on each rank. With more than one rank,
    rank 0 always tokenizes in separate processes. All ranks must call this with the same arguments, and get the record; only
    rank 0's corpus needs paths.

    Raises `UserError` if a document cannot be read (see `Corpus`), the corpus has no tokens, a worker dies, PREFIX
    exists without `overwrite`, or another run is writing it. Then nothing is written under PREFIX. Encoded parts stay
    in PREFIX.parts, and the next run with the same input and options continues from them.
    """
    # We use processes, not the library's threads, which would not survive forking.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    first = ranks.rank == 0
    parts, outputs = Parts(prefix), files_of(prefix)
    with os_errors_named(prefix), parts.locked() if first else nullcontext():
        if first:
            parts.take_back(outputs)
            refuse_existing(outputs.values(), overwrite)
        reference = load_tokenizer(tokenizer_path, eod)
        # Fail before gigatoken's proof, which takes time.
        end = end_of_document(reference) if append_eod else None
        units, tokenizer = plan(corpus, reference, engine, [*outputs.values(), parts.folder], ranks)
        encoder = Encoder(corpus, units, tokenizer, parts, eod=end, limit=max_documents)
        encoder.names, encoder.joined = ranks.broadcast(
            encoder.known(in_order=shuffle_seed is None) if first else None
        )
        record = None
        own = range(ranks.rank, len(units), ranks.size)
        # Rank 0 leaves encoding to a worker, so that it is free to join the other ranks' parts.
        joins_for_others = first and ranks.size > 1
        helpers = workers if joins_for_others or min(workers, len(own)) > 1 else 0
        with closing(encode_units(encoder, own, helpers)) as encoded:
            if first:  # it joins parts while all ranks encode the next ones
                record = join_as_they_come(encoder, encoded, ranks, prefix, shuffle_seed)
            else:
                parts.wait_for_folder(ranks.rank)
                for numbered in encoded:
                    ranks.send(numbered)
                ranks.send(ALL_SENT)
        shared: Record = ranks.broadcast(record)
    return shared


def end_of_document(tokenizer: Tokenizer) -> int:
    """The token's id, which is also logged; raises `UserError` if there is none."""
    log.info(
        "end of document: %r (id %d; %s)",
        tokenizer.token_of(tokenizer.eod),
        tokenizer.eod,
        tokenizer.eod_reason,
    )
    return tokenizer.eod


def plan(
    corpus: Corpus, reference: Tokenizer, engine: str, outputs: Sequence[Path], ranks: Ranks
) -> tuple[list[Unit], Tokenizer]:
    """(units, tokenizer to encode with): rank 0's choice, on every rank. Raises `UserError` if their tokenizers differ."""
    if ranks.rank == 0:
        corpus.leave_out(outputs)
        units = corpus.units()
        tokenizer, make = with_engine(reference, engine, lambda: first_texts(corpus, units))
        ranks.broadcast((units, make, reference.fingerprint, reference.eod_or_none))
        return units, tokenizer
    units, make, *identity = ranks.broadcast(None)
    if identity != [reference.fingerprint, reference.eod_or_none]:
        raise UserError(f"tokenizer {reference.name}: differs between rank {ranks.rank} and rank 0")
    made: Tokenizer = make(reference)
    return units, made


def first_texts(corpus: Corpus, units: Sequence[Unit]) -> Iterator[str]:
    """The readable documents, from the beginning."""
    readable = Corpus([], text_key=corpus.text_key, on_error="skip")
    for unit in units:
        for text in readable.read(unit):
            yield text.decode()


@dataclass
class Encoder:
    """Encodes units to parts."""

    corpus: Corpus
    units: Sequence[Unit]
    tokenizer: Tokenizer
    parts: Parts
    eod: int | None
    limit: int | None
    """Number of documents wanted from the beginning of a unit; None: all."""
    progress: Progress | None = None
    names: Sequence[str] = ()
    """Names of the parts, one per unit."""
    joined: Mapping[str, Part] = field(default_factory=dict)
    """The parts that the dataset already begins with."""

    def __post_init__(self) -> None:
        self.dtype = dtype_for(self.tokenizer.vocab_size)

    def part(self, number: int, limit: int | None = None) -> Part:
        """The part of a unit, or of its first `limit` documents: from an earlier run, or encoded now."""
        unit, name = self.units[number], self.names[number]
        if limit is None:
            limit = self.limit
        else:
            name = part_name(name, limit)
        found = self.joined.get(name) or self.parts.load(name)
        if found and (not found.skipped or self.corpus.on_error == "skip"):
            self._report(sum(span.size for span in unit), found.tokens)
            return found
        self.corpus.restart()
        reported = 0
        with PartWriter(self.parts, name) as writer:
            for texts, text_bytes in batches_of(islice(self.corpus.read(unit), limit)):
                tokens, lengths = self._encode(texts)
                writer.add(tokens, lengths, text_bytes)
                self._report(self.corpus.consumed - reported, len(tokens))
                reported = self.corpus.consumed
            return writer.finish(self.corpus.skipped, self.corpus.first_skipped)

    def _encode(self, texts: Sequence[bytes]) -> Encoded:
        """`texts` in the dtype of the dataset; each non-empty one ends with `eod`."""
        ids, lengths = self.tokenizer.encode(texts, self.eod)
        if ids.size and ids.max() >= self.tokenizer.vocab_size:
            raise UserError(
                f"tokenizer {self.tokenizer.name}: token id {ids.max()} is not below its vocabulary size "
                f"{self.tokenizer.vocab_size}"
            )
        return Encoded(ids.astype(self.dtype), lengths)

    def _report(self, bytes_on_disk: int, tokens: int) -> None:
        if self.progress:
            self.progress.add(bytes_on_disk, tokens)

    def known(self, in_order: bool) -> tuple[list[str], dict[str, Part]]:
        """`names` and `joined`."""
        names, seen = [], Counter[str]()
        for unit in self.units:
            content = self._content_name(unit)
            # A file may be given twice, but a part is joined only once.
            names.append(part_name(content, seen[content]))
            seen[content] += 1
        return names, self.parts.joined(names, self.dtype.itemsize) if in_order else {}

    def _content_name(self, unit: Unit) -> str:
        spans: list[Any] = []
        for span in unit:
            spans.append([*identity_of(span.file), span.form, span.first, span.end])
        return part_name(
            spans, self.corpus.text_key, self.tokenizer.fingerprint, self.eod, self.dtype.str, self.limit
        )


def batches_of(texts: Iterator[bytes]) -> Iterator[tuple[list[bytes], int]]:
    """(consecutive texts, their size in bytes); a batch is complete once it has `BATCH_BYTES` or more."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def encode_units(
    encoder: Encoder, numbers: Sequence[int], workers: int
) -> Generator[NumberedPart, None, None]:
    """(number, part) of each of these units, in order, until there are enough documents."""
    documents = 0
    with Progress(sum(span.size for number in numbers for span in encoder.units[number])) as progress:
        reporting = replace(encoder, progress=progress)
        with closing(in_order(reporting.part, numbers, workers, progress.show)) as results:
            for number, part in zip(numbers, results, strict=False):
                yield number, part
                documents += part.documents
                if encoder.limit is not None and documents >= encoder.limit:
                    break


def join_as_they_come(
    encoder: Encoder, own: Generator[NumberedPart], ranks: Ranks, prefix: Path, shuffle_seed: int | None
) -> Record:
    """Joins this rank's parts and those that the others send, and removes them all."""
    found = parts_of_all(encoder, own, ranks)
    record = join_parts(encoder, first_documents(encoder, found, encoder.limit), prefix, shuffle_seed)
    own.close()
    # Wait for other ranks, which may still be writing parts that are no longer needed.
    deque(found, maxlen=0)
    encoder.parts.remove()
    return record


def parts_of_all(encoder: Encoder, own: Iterator[NumberedPart], ranks: Ranks) -> Iterator[NumberedPart]:
    """On rank 0: the parts of all ranks in the order of their units. While the next one has not arrived, continues `own`.

    When it ends, no other rank is writing. Raises `UserError` if a part of another rank cannot be seen here.
    """
    waiting: dict[int, Part] = {}
    number, at_work = 0, ranks.size - 1
    while True:
        for message in ranks.received():
            if message is ALL_SENT:
                at_work -= 1
            else:
                waiting.update([message])
        if number in waiting:
            part = waiting.pop(number)
            if (rank := number % ranks.size) and part.name not in encoder.joined:
                encoder.parts.wait_for(part, encoder.dtype.itemsize, rank)
            yield number, part
            number += 1
        elif mine := next(own, None):
            waiting.update([mine])
        elif at_work:
            time.sleep(POLL_SECONDS)
        else:
            return


def first_documents(encoder: Encoder, found: Iterable[NumberedPart], limit: int | None) -> Iterator[Part]:
    """The parts with the first `limit` documents. The unit in which the limit falls is encoded again, up to the limit."""
    for number, part in found:
        first = part if limit is None or part.documents <= limit else encoder.part(number, limit)
        yield first
        limit = None if limit is None else limit - first.documents
        if limit == 0:
            break  # the next part may never come


def join_parts(encoder: Encoder, found: Iterable[Part], prefix: Path, shuffle_seed: int | None) -> Record:
    """Joins the parts to the dataset PREFIX, one after another or shuffled by document.

    Joined one after another, parts are moved into the dataset's file, from which an interrupted run continues.
    """
    corpus, tokenizer, parts = encoder.corpus, encoder.tokenizer, encoder.parts
    joined: list[Part] = []
    in_order = shuffle_seed is None
    with IndexedWriter(
        prefix, encoder.dtype, parts.folder, parts.joined_tokens if in_order else None
    ) as writer:
        for part in found:
            if in_order:
                lengths = parts.lengths(part)
                sequences = (lengths[lengths > 0], (lengths > 0).astype(np.int64))
                if part.name not in encoder.joined:
                    writer.add_file(parts.tokens_file(part), *sequences)
                    parts.add_joined(part)
                elif not parts.is_sound(part, writer.add_kept(*sequences)):
                    raise parts.damaged_joined(before.name for before in joined)
            joined.append(part)
        if shuffle_seed is not None:
            add_shuffled(
                writer, [(parts.tokens_file(part), parts.lengths(part)) for part in joined], shuffle_seed
            )
        corpus.skipped = sum(part.skipped for part in joined)
        corpus.first_skipped = next((part.first_skipped for part in joined if part.skipped), None)
        if not writer.num_tokens:
            parts.remove()
            raise UserError(
                f"the corpus is empty: no tokens in {writer.num_documents} documents of "
                f"{', '.join(corpus.names)} ({corpus.skipped} skipped)"
            )
        record = Record(
            tokenizer=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod_or_none,
            append_eod=encoder.eod is not None,
            documents=writer.num_documents,
            sequences=writer.num_sequences,
            tokens=writer.num_tokens,
            sha256=writer.sha256,
            skipped=corpus.skipped,
            source=corpus.names,
            text_bytes=sum(part.text_bytes for part in joined),
        )
        with parts.publishing():
            writer.finish(record)
    return record
