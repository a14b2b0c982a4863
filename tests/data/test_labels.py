"""The label file beside a dataset: what is written is read, and a file that is damaged or of other tokens is refused."""

from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.labels import HEADER, Labels, read_labels, write_labels
from megadyn.data.record import Record
from megadyn.errors import UserError

NAMES = ("text", "answer")
CLASSES, HOPS = np.array([0, 1, 0, 1, 0], np.uint8), np.array([0, 3, 0, 1, 0], np.uint8)


def write(prefix: Path, tokens: list[int]) -> str:
    """A dataset of one document; returns the hash of its tokens."""
    with IndexedWriter(prefix, "<u2") as writer:
        writer.add(np.array(tokens), [len(tokens)], [1])
        counts = {
            "documents": 1,
            "sequences": 1,
            "tokens": len(tokens),
            "sha256": writer.sha256,
            "skipped": 0,
        }
        writer.finish(
            Record(
                tokenizer="byte",
                fingerprint="",
                vocab_size=9,
                eod=None,
                append_eod=False,
                source=[],
                **counts,
            )
        )
        return writer.sha256


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_labels(tmp_path / "set", Labels(NAMES, CLASSES, HOPS), write(tmp_path / "set", [1, 2, 3, 4, 5]))
    return tmp_path / "set"


def test_what_is_written_is_read(prefix: Path) -> None:
    found = read_labels(IndexedDataset(prefix))
    assert found.names == NAMES
    assert found.classes.tolist() == CLASSES.tolist() and found.hops.tolist() == HOPS.tolist()
    assert {path.name for path in prefix.parent.iterdir()} == {"set.bin", "set.idx", "set.json", "set.labels"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: b"", "not the labels of a dataset"),
        (lambda raw: b"X" + raw[1:], "not the labels of a dataset"),
        (lambda raw: raw[:8] + b"\x02" + raw[9:], "version 2 of the label format; only 1 is known"),
        (lambda raw: raw[:-1], r"72 bytes, but its header describes 73; was it cut short\?"),
        (
            lambda raw: raw[: HEADER.size + 13] + b"\x02" + raw[HEADER.size + 14 :],
            "token 2 has class 2, but only 2",
        ),
    ],
)
def test_damaged_labels_are_refused_in_one_sentence(prefix: Path, change, problem: str) -> None:
    path = Path(f"{prefix}.labels")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=problem) as refused:
        read_labels(IndexedDataset(prefix))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4], [5, 4, 3, 2, 1]], ids=["fewer", "others"])
def test_labels_of_other_tokens_are_refused(prefix: Path, tokens: list[int]) -> None:
    write(prefix, tokens)
    with pytest.raises(UserError, match="labels of other tokens than those of"):
        read_labels(IndexedDataset(prefix))


def test_missing_labels_are_named(prefix: Path) -> None:
    Path(f"{prefix}.labels").unlink()
    with pytest.raises(UserError, match=r"set\.labels: No such file"):
        read_labels(IndexedDataset(prefix))
