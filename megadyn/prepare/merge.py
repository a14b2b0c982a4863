"""Copies several indexed datasets into one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megadyn.data.indexed import IndexedDataset, files_of
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.record import Record
from megadyn.errors import UserError
from megadyn.files import os_errors_named, refuse_existing
from megadyn.progress import BYTES, Bar, each


def merge_datasets(prefixes: Sequence[Path], output: Path, *, overwrite: bool = False) -> IndexedDataset:
    """Writes the datasets one after another to `output`: the same bytes as from preprocessing all their inputs at once.

    Raises `UserError` if they differ in dtype, tokenizer or end-of-document token, if only some of them record their
    tokenizer, or if `output` exists without `overwrite`.
    """
    refuse_existing(files_of(output).values(), overwrite)
    first = IndexedDataset(prefixes[0])
    total = bytes_of(first)
    # all, before the first is copied; one at a time, for there may be thousands
    for prefix in each(prefixes[1:], "opening datasets", len(prefixes) - 1):
        check_alike(first, other := IndexedDataset(prefix))
        total += bytes_of(other)
    records = []
    with (
        os_errors_named(output),
        IndexedWriter(output, first.dtype) as writer,
        Bar("copying", total, BYTES) as bar,
    ):
        for prefix in prefixes:
            dataset = IndexedDataset(prefix)
            check_alike(first, dataset)  # again: it is another file now if it was replaced meanwhile
            writer.add_dataset(dataset, bar.add)
            records.append(dataset.record)
        writer.finish(merged_record(records, writer))
    return IndexedDataset(output)


def bytes_of(dataset: IndexedDataset) -> int:
    return dataset.num_tokens * dataset.dtype.itemsize


def check_alike(first: IndexedDataset, other: IndexedDataset) -> None:
    between = f"datasets {first.prefix} and {other.prefix}"
    if first.dtype != other.dtype:
        raise UserError(
            f"{between} hold {first.dtype} and {other.dtype} tokens; only equal types can be merged"
        )
    if first.record is None or other.record is None:
        if first.record is not other.record:
            known, unknown = (first, other) if first.record else (other, first)
            raise UserError(
                f"there is no record of which tokenizer made dataset {unknown.prefix}; "
                f"remove {known.prefix}.json to merge it with {known.prefix} unchecked"
            )
        return
    if first.record.fingerprint != other.record.fingerprint:
        raise UserError(
            f"{between} were made with different tokenizers ({first.record.tokenizer}, "
            f"{first.record.fingerprint[:12]}; {other.record.tokenizer}, {other.record.fingerprint[:12]})"
        )
    if first.record.append_eod != other.record.append_eod:
        raise UserError(f"{between} differ in --append-eod; only one of them ends its documents with a token")
    if first.record.append_eod and first.record.eod != other.record.eod:
        raise UserError(
            f"{between} end their documents with different tokens (ids {first.record.eod} and {other.record.eod}); "
            "preprocess one of them again with --eod"
        )


def merged_record(records: Sequence[Record | None], writer: IndexedWriter) -> Record | None:
    known = [record for record in records if record]
    if not known:
        return None
    text_bytes = [record.text_bytes for record in known if record.text_bytes is not None]
    return replace(
        known[0],
        text_bytes=sum(text_bytes) if len(text_bytes) == len(known) else None,
        documents=writer.num_documents,
        sequences=writer.num_sequences,
        tokens=writer.num_tokens,
        sha256=writer.sha256,
        skipped=sum(record.skipped for record in known),
        source=[source for record in known for source in record.source],
    )
