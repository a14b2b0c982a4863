"""Trains a byte-level BPE tokenizer."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from megadyn.errors import UserError
from megadyn.files import os_errors_named, temporary_beside
from megadyn.tokenization.tokenizer import Tokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257
"""All byte values and the end-of-text token."""
LARGEST_VOCAB = 2**24
"""Far above any in use. The library allocates its tables at once, and aborts if they are too large."""
FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "model_max_length": int(1e30),  # Hugging Face's number for "no limit"
    "clean_up_tokenization_spaces": False,  # true would change decoded text
}


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, folder: Path, *, overwrite: bool = False
) -> Tokenizer:
    """Trains on `documents` and writes `folder`, which `transformers.AutoTokenizer` can load.

    The same documents give the same bytes. `<|endoftext|>` has id 0. The vocabulary is smaller than `vocab_size` if the
    text has too few different words. The folder is written atomically.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"vocabulary size {vocab_size}: must be at least {SMALLEST_VOCAB} (every byte and {END_OF_TEXT})"
        )
    if vocab_size > LARGEST_VOCAB:
        raise UserError(f"vocabulary size {vocab_size}: must be at most {LARGEST_VOCAB}")
    refuse_folder(folder, overwrite)
    trained = train_bpe(documents, vocab_size)
    with os_errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = temporary_beside(folder)
        fresh.mkdir()
        try:
            (fresh / FILES[0]).write_text(trained)
            (fresh / FILES[1]).write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
            replace_folder(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return load_tokenizer(folder)


def train_bpe(documents: Iterable[str], vocab_size: int) -> str:
    """Content of tokenizer.json; `UserError` if the documents hold no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in documents:
            seen += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("the corpus is empty: no document holds any text to train a tokenizer on")
    text: str = tokenizer.to_str(pretty=True)
    return text


def refuse_folder(folder: Path, overwrite: bool) -> None:
    """Raises `UserError` unless `folder` is missing, empty, or with `overwrite` contains a tokenizer and nothing else."""
    with os_errors_named(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names and not overwrite:
        raise UserError(f"{folder} exists already; give --overwrite to replace it")
    if other := [name for name in names if name not in FILES]:
        raise UserError(f"{folder}: holds more than a tokenizer ({other[0]}), so it will not be replaced")


def replace_folder(fresh: Path, folder: Path) -> None:
    """Renames `fresh` to `folder`, then removes what was there before."""
    if folder.exists():
        old = temporary_beside(folder)
        os.rename(folder, old)
        try:
            os.rename(fresh, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old)
    else:
        os.rename(fresh, folder)
