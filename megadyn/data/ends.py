"""Makes all datasets of a run use the same end-of-document token: the one with which they were made."""

from megadyn.data.indexed import IndexedDataset
from megadyn.errors import UserError
from megadyn.log import log
from megadyn.tokenization.tokenizer import Tokenizer

LOOKED_AT = 256
"""Number of documents, spread over a dataset without a record, whose last token is checked."""


def written_eod(dataset: IndexedDataset) -> int | None:
    """The token that ends the documents of `dataset`, according to its record; None if that is unknown."""
    record = dataset.record
    return record.eod if record and record.append_eod else None


def adopt_eod(tokenizer: Tokenizer, dataset: IndexedDataset) -> None:
    """Replaces the tokenizer's end-of-document token by the dataset's, which may differ (`--eod`, another tokenizer folder)."""
    eod = written_eod(dataset)
    if eod is None or eod == tokenizer.eod_or_none:
        return
    token = tokenizer.token_of(eod)
    log.info(
        "end of document: %r (id %d), with which dataset %s was made, instead of tokenizer %s's own",
        token,
        eod,
        dataset.prefix,
        tokenizer.name,
    )
    tokenizer.choose_eod(token, f"in the record of dataset {dataset.prefix}")


def check_eod(dataset: IndexedDataset, eod: int | None) -> None:
    """Raises `UserError` if the record of `dataset` says that its documents end with another token than `eod`."""
    written = written_eod(dataset)
    if written is not None and written != eod:
        raise UserError(
            f"dataset {dataset.prefix} ends its documents with token id {written}, but {eod} should end them "
            "(tokenizer.eod, or the first dataset's token); make it again with --eod, or use only datasets with the same token"
        )


def check_marked(dataset: IndexedDataset, eod: int) -> None:
    """Raises `UserError` unless all documents of `dataset` end with `eod`: by its record, or by a sample of documents."""
    record = dataset.record
    if record is not None and not record.append_eod:
        raise UserError(
            f"data.document_mask: dataset {dataset.prefix} was made without --append-eod, so nothing in it "
            "marks where documents end; make it again with --append-eod, or set data.document_mask=false"
        )
    check_eod(dataset, eod)
    if written_eod(dataset) is not None:
        return
    count = dataset.num_documents
    for k in sorted({i * count // LOOKED_AT for i in range(LOOKED_AT if count else 0)}):
        document = dataset.document(k)
        if len(document) and document[-1] != eod:
            raise UserError(
                f"data.document_mask: document {k} of dataset {dataset.prefix} ends with token id {document[-1]}, "
                f"not with {eod}, so nothing marks its end; set tokenizer.eod to the token that ends its "
                "documents, or data.document_mask=false"
            )
