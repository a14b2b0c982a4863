"""Small corpora, tokenizers and datasets that several test files share."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.log import log
from megadyn.prepare.train_tokenizer import train_tokenizer
from tests.helpers.corpora import random_texts

NUMBERS = itertools.count()
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("shared") / "tokenizer"
    train_tokenizer(random_texts(100), 300, folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    path: Path = tmp_path_factory.mktemp("shared") / "pieces.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(random_texts(100)),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    return path


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """write_dataset([[3, 0], [], [2]]): documents given as the lengths of their sequences; tokens count up from 0."""

    def write(
        documents: Sequence[Sequence[int]], name: str = "dataset", dtype: str = "<i4"
    ) -> IndexedDataset:
        lengths = [length for document in documents for length in document]
        with IndexedWriter(tmp_path / name, dtype) as writer:
            writer.add(np.arange(sum(lengths)), lengths, [len(document) for document in documents])
            writer.finish()
        return IndexedDataset(tmp_path / name)

    return write


@pytest.fixture
def run_tool_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_tool_script("inspect_dataset", prefix, ...) runs tools/inspect_dataset.py in a process of its own."""

    def run(name: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadyn.prepare.units.UNIT_BYTES", 500)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger="megadyn")
    return caplog


@pytest.fixture(autouse=True)
def own_proofs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another, or the user, has proved."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache-{next(NUMBERS)}"))
