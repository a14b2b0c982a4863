"""The section on the phases of a run."""

import json
from html import escape

import numpy as np

from megadyn.report.axes import brief
from megadyn.report.run import Record, Run


def phase_section(run: Run, suffix: str) -> str:
    """A table with one row per phase that has begun; empty for a run without phases. `suffix`: of the heading."""
    rows = "".join(row(run, phase) for phase in run.phases)
    if not rows:
        return ""
    head = "".join(
        f"<th>{name}</th>"
        for name in ("phase", "iterations", "steps of", "tokens", "loss at its end", "changes")
    )
    return f'<h2>Phases{suffix}</h2><div class="card wide"><table><tr>{head}</tr>{rows}</table></div>'


def row(run: Run, phase: Record) -> str:
    inside = (run.iterations > phase["begin"]) & (run.iterations <= phase["end"])
    losses = run.values("lm_loss")[inside]
    known = losses[np.isfinite(losses)]
    ends = run.tokens_at(np.array([phase["begin"], min(phase["end"], run.last_iteration)], np.float64))
    changes = "; ".join(
        f"{key} = {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in phase["changes"].items()
    )
    cells = (
        f"{phase['begin'] + 1:,} to {phase['end']:,}",
        f"{phase['global_batch_size']:,} x {phase['sequence_length']:,}",
        brief(float(ends[1] - ends[0])),
        f"{known[-1]:.4f}" if known.size else "-",
    )
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"<tr><td>{escape(str(phase['name']))}</td>{numbers}<td>{escape(changes)}</td></tr>"
