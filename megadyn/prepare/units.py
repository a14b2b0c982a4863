"""Cuts a corpus into pieces of work. The cuts depend only on the files, so they are the same for any number of workers."""

from collections.abc import Iterator, Sequence
from functools import partial

from megadyn.errors import UserError
from megadyn.prepare.columns import open_parquet
from megadyn.prepare.detect import Kind, kind_of
from megadyn.prepare.formats import Span
from megadyn.prepare.remote import File, of_each, size_of

UNIT_BYTES = 2**23
"""Approximate minimum of text bytes in each unit except the last."""
PACKED = 4
"""Approximate compression ratio of Parquet and compressed files, so that their units hold as much text as others."""
MOST_UNITS = 2**12
"""A corpus has fewer units than this plus the number of files that cannot be cut. Each unit needs two small temporary files."""

Unit = tuple[Span, ...]
"""Consecutive pieces of a corpus that one process reads."""


def units_of(files: Sequence[File], form: str, refuse: bool = False) -> list[Unit]:
    """Units of all `files`, in order; with `refuse`, raises `UserError` for the first file that cannot be read."""
    sizes, kinds = [size_of(file) for file in files], of_each(partial(kind_of, form=form), files)
    for file, kind in zip(files, kinds, strict=True):
        if refuse and kind.problem:
            raise UserError(f"{file}: {kind.problem} (to skip such files: --on-error skip)")
    packs = [PACKED if kind.form == "parquet" or not kind.is_plain else 1 for kind in kinds]
    least = unit_bytes(sum(size * pack for size, pack in zip(sizes, packs, strict=True)))
    tables = [file for file, kind in zip(files, kinds, strict=True) if kind.form == "parquet"]
    groups = dict(zip(tables, of_each(row_groups, tables), strict=True))
    units, unit, held = [], [], 0
    for file, size, kind, pack in zip(files, sizes, kinds, packs, strict=True):
        for span in spans_of(file, size, kind, least // pack, groups.get(file, 0)):
            unit.append(span)
            held += span.size * pack
            if held >= least:
                units.append(tuple(unit))
                unit, held = [], 0
    return [*units, tuple(unit)] if unit else units


def unit_bytes(total: int) -> int:
    """`UNIT_BYTES`, doubled until there are few enough units. So a corpus that grows a little keeps its units."""
    least = UNIT_BYTES
    while total // least >= MOST_UNITS:
        least *= 2
    return least


def spans_of(file: File, size: int, kind: Kind, least: int, groups: int) -> Iterator[Span]:
    """Cuts `file` into pieces of about `least` bytes on disk; one piece if its format cannot be cut. `groups`: its row groups."""
    form = kind.form
    if form == "jsonl" and kind.is_plain:
        for first in range(0, size, least):
            end = min(first + least, size)
            yield Span(file, form, first, end, end - first)
    elif form == "parquet" and groups:
        step = max(1, least * groups // max(1, size))
        for first in range(0, groups, step):
            end = min(first + step, groups)
            yield Span(file, form, first, end, size * end // groups - size * first // groups)
    else:
        yield Span(file, form, 0, 0, size)


def row_groups(file: File) -> int:
    """Number of row groups; 0 for a file that is not Parquet (reading it will report why)."""
    import pyarrow

    try:
        with open_parquet(file) as table:
            return int(table.num_row_groups)
    except (pyarrow.ArrowException, OSError):
        return 0
