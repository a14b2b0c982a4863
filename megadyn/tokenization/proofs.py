"""Caches what was proved about gigatoken with a tokenizer, because comparing thousands of added tokens takes seconds.

Only proofs that depend on the tokenizer and the libraries are cached. The documents of the corpus are compared at each start.
"""

import hashlib
import json
import os
import sys
import unicodedata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from megadyn.files import temporary_beside
from megadyn.log import log
from megadyn.tokenization.tokenizer import Tokenizer

LAYOUT = 1
"""Part of every name; increased whenever the proof demands more, or gigatoken is used differently."""
LIBRARIES = ("gigatoken", "tokenizers", "sentencepiece", "numpy")


class Proved(NamedTuple):
    """In which mode gigatoken gives the ids of the reference tokenizer."""

    apart: bool
    in_pieces: bool


def folder() -> Path:
    """`$XDG_CACHE_HOME/megadyn/proofs`, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megadyn" / "proofs"


def library_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


class KeptProof:
    """The cache entry of one tokenizer, named by a hash of everything that its proof depends on."""

    def __init__(self, reference: Tokenizer) -> None:
        what = [
            LAYOUT,
            type(reference).__name__,
            reference.fingerprint,
            reference.added_tokens(),
            reference.eod_or_none,
            unicodedata.unidata_version,
            sys.version_info[:2],
            *map(library_version, LIBRARIES),
        ]
        self.path = folder() / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]}.json"

    def read(self) -> Proved | None:
        """The entry; None if there is none or it is damaged."""
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        if (
            not isinstance(content, dict)
            or sorted(content) != sorted(Proved._fields)
            or not all(isinstance(value, bool) for value in content.values())
        ):
            return None
        return Proved(**content)

    def write(self, proved: Proved) -> None:
        temporary = temporary_beside(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(proved._asdict()))
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            log.info("engine: the proof cannot be cached (%s: %s)", self.path.parent, error.strerror)
