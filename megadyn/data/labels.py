"""PREFIX.labels: what each token of a generated dataset is, beside the indexed files, which it leaves untouched.

# PREFIX.labels, little-endian, no padding, N tokens:
#   header  magic 8s | version u16 | bytes of names u16 | N u64 | sha256 of PREFIX.bin 32s
#   names   UTF-8    names of the classes, joined by newlines
#   class   [N] u8   index into the names
#   hops    [N] u8   lookups, one after another, that predicting this token takes; 0 if none
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megadyn.data.indexed import IndexedDataset
from megadyn.errors import UserError
from megadyn.files import os_errors_named, temporary_beside

HEADER = struct.Struct("<8sHHQ32s")
MAGIC = b"MDLABEL\0"
VERSION = 1

Codes = NDArray[np.uint8]


class Labels(NamedTuple):
    """Labels of N tokens, in the order of the dataset's file."""

    names: tuple[str, ...]
    """Names of the classes."""
    classes: Codes
    """[N], index into `names`."""
    hops: Codes
    """[N]"""


def labels_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.labels")


def write_labels(prefix: Path | str, labels: Labels, sha256: str) -> None:
    """Writes PREFIX.labels, which appears when it is complete. `sha256`: of PREFIX.bin, in hexadecimal."""
    path, names = labels_path(prefix), "\n".join(labels.names).encode()
    temporary = temporary_beside(path)
    with os_errors_named(path):
        try:
            with temporary.open("wb") as file:
                file.write(
                    HEADER.pack(MAGIC, VERSION, len(names), len(labels.classes), bytes.fromhex(sha256))
                )
                file.write(names)
                file.write(labels.classes.astype("u1").tobytes())
                file.write(labels.hops.astype("u1").tobytes())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_labels(dataset: IndexedDataset) -> Labels:
    """The labels of a dataset. Raises UserError if they are missing, damaged or those of other tokens."""
    path = labels_path(dataset.prefix)
    with os_errors_named(path):
        raw = path.read_bytes()
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise UserError(f"{path}: not the labels of a dataset (it does not begin with {MAGIC!r})")
    _, version, size, count, digest = HEADER.unpack_from(raw)
    if version != VERSION:
        raise UserError(f"{path}: version {version} of the label format; only {VERSION} is known")
    if len(raw) != (want := HEADER.size + size + 2 * count):
        raise UserError(f"{path}: {len(raw)} bytes, but its header describes {want}; was it cut short?")
    recorded = dataset.record.sha256 if dataset.record else digest.hex()
    if count != dataset.num_tokens or digest.hex() != recorded:
        raise UserError(f"{path}: labels of other tokens than those of {dataset.prefix}; generate both again")
    names = tuple(raw[HEADER.size : HEADER.size + size].decode(errors="replace").split("\n"))
    classes, hops = np.frombuffer(raw, "u1", offset=HEADER.size + size).reshape(2, count)
    if count and int(classes.max()) >= len(names):
        raise UserError(
            f"{path}: token {int((classes >= len(names)).argmax())} has class {int(classes.max())}, "
            f"but only {len(names)} classes have names"
        )
    return Labels(names, classes, hops)
