"""From run folders to the page's file."""

import os
from pathlib import Path
from typing import Any

from megadyn.errors import UserError
from megadyn.files import temporary_beside
from megadyn.log import log
from megadyn.report.page import Subject, page
from megadyn.report.run import Run, read_checkpoints, read_runs


def write_report(
    folders: list[Path], output: Path, *, tokens: int, look_at_checkpoints: bool = True
) -> dict[str, Any]:
    """Writes the page about one run, or two runs together; returns a summary of its contents.

    The first `tokens` tokens of a validation text are run through the newest intact checkpoint; 0 leaves this out.
    Raises UserError if a folder contains no run or `output` cannot be written; an existing file there is then kept.
    """
    check_output(output)
    log.info("reading %s", " and ".join(map(str, folders)))
    subjects = [study(run, tokens, look_at_checkpoints) for run in read_runs(folders)]
    html = page(subjects).encode()
    temporary = temporary_beside(output)
    try:
        try:
            temporary.write_bytes(html)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # including an error when the file is closed
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    return {"output": str(output), "bytes": len(html), "runs": [summary(subject) for subject in subjects]}


def check_output(output: Path) -> None:
    """Checked before the work. The suffix prevents a typing mistake from replacing a run's metrics."""
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"{output}: the report is an HTML file; give it a name that ends in .html")
    if output.is_dir():
        raise UserError(f"{output}: is a folder")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder to write {output.name} into")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"{output.parent}: no permission to write {output.name} into it")


def study(run: Run, tokens: int, look_at_checkpoints: bool) -> Subject:
    checkpoints = read_checkpoints(run.folder) if look_at_checkpoints else None
    newest = next((one.folder for one in checkpoints or () if one.problem is None and one.is_used), None)
    if tokens == 0:
        return Subject(run, checkpoints, "left out (--tokens 0)")
    if newest is None:
        return Subject(
            run,
            checkpoints,
            "the run folder holds no intact checkpoint"
            if look_at_checkpoints
            else "checkpoints were not read (--no-checkpoints)",
        )
    log.info("loading torch, to route a text through %s", newest)
    from megadyn.report.text_map import map_text  # torch, seconds of imports: only where it is needed

    try:
        return Subject(run, checkpoints, map_text(run.folder, newest, tokens), newest.name)
    except UserError as error:
        return Subject(run, checkpoints, str(error))


def summary(subject: Subject) -> dict[str, Any]:
    run, checkpoints = subject.run, subject.checkpoints
    return {
        "folder": str(run.folder),
        "iteration": run.last_iteration,
        "training_records": len(run.training),
        "notes": run.notes,
        "checkpoints": None if checkpoints is None else len(checkpoints),
        "damaged_checkpoints": None
        if checkpoints is None
        else sum(one.problem is not None for one in checkpoints),
        "text_tokens": 0 if isinstance(subject.text, str) else len(subject.text.pieces),
        "no_text": subject.text if isinstance(subject.text, str) else None,
    }
