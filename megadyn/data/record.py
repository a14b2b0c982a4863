"""PREFIX.json: how a dataset was made. Megatron-LM neither writes nor reads it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from megadyn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Record:
    """The tokenizer and corpus from which PREFIX.bin and PREFIX.idx were made."""

    tokenizer: str
    fingerprint: str
    """sha256 of the tokenizer's content (`Tokenizer.fingerprint`)."""
    vocab_size: int
    eod: int | None = None
    """The end-of-document token; None in old records, which lack it."""
    append_eod: bool
    """Whether each non-empty document ends with `eod`."""
    documents: int
    sequences: int
    tokens: int
    sha256: str
    """Hash of PREFIX.bin, the token stream."""
    skipped: int
    """Documents skipped because they could not be read."""
    source: list[str]
    text_bytes: int | None = None
    """Size of the documents' texts in UTF-8; None if unknown."""

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def read_record(path: Path) -> Record | None:
    """The record at `path`; None if there is none. Raises `UserError` if it is damaged."""
    if not path.exists():
        return None
    try:
        record = Record(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not the record of a dataset ({error})") from error
    for name, kind in get_type_hints(Record).items():
        value = getattr(record, name)
        if not (is_strings(value) if name == "source" else isinstance(value, kind)):
            raise UserError(f"{path}: not the record of a dataset ({name} is {value!r})")
    return record


def is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)
