"""The section on scores on tasks of lm_eval (`training.tasks`)."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from megadyn.report.charts import COLOURS, Curve
from megadyn.report.curves import STYLES, Over
from megadyn.report.run import Record, Run, number

MOST_CURVES = COLOURS * len(STYLES)
"""In a chart: more could not be told apart."""


def tasks_section(runs: Sequence[Run]) -> str:
    """A chart per metric with a curve per task, and a table of the last scores; empty if no run was evaluated on tasks."""
    if not any(run.tasks for run in runs):
        return ""
    over = Over(runs)
    charts = [chart for run in runs for chart in charts_of(over, run)]
    tables = "".join(table(over, run) for run in runs if run.tasks)
    return f'<h2>Tasks</h2>{tables}<div class="grid-of">{"".join(charts)}</div>'


def charts_of(over: Over, run: Run) -> list[str]:
    at = over.x(run, np.array([record["iteration"] for record in run.tasks], np.float64))
    found: dict[str, list[str]] = {}
    for task, metric in scores(run.tasks):
        found.setdefault(metric, []).append(task)
    charts = []
    for metric, tasks in found.items():
        for first in range(0, len(tasks), MOST_CURVES):
            curves = [
                Curve(
                    task,
                    at,
                    np.array([number(record, "tasks", task, metric) for record in run.tasks], np.float64),
                    i % COLOURS,
                    STYLES[i // COLOURS][0],
                )
                for i, task in enumerate(tasks[first : first + MOST_CURVES])
            ]
            charts.append(over.lines(over.named(run, f"Tasks: {metric}"), curves))
    return charts


def table(over: Over, run: Run) -> str:
    """The last score of each task, with its standard error where that is known."""
    rows = []
    for task, metric in scores(run.tasks):
        record = next(one for one in reversed(run.tasks) if metric in values(one, task))
        cells = (
            shown(record, task, metric),
            shown(record, task, stderr_of(metric)),
            f"{record['iteration']:,}",
        )
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{escape(task)}</td><td>{escape(metric)}</td>{numbers}</tr>")
    names = ("task", "metric", "last score", "standard error", "iteration")
    head = "".join(f"<th>{name}</th>" for name in names)
    title = f"<h3>{escape(run.name)}</h3>" if over.several else ""
    return f'{title}<div class="card wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def scores(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Every task with each of its metrics, in the order of the records."""
    found = {
        (task, metric): None
        for record in records
        for task in record["tasks"]
        for metric in values(record, task)
        if "_stderr" not in metric
    }
    return list(found)


def values(record: Record, task: str) -> Record:
    found = record["tasks"].get(task)
    return found if isinstance(found, dict) else {}


def stderr_of(metric: str) -> str:
    """`exact_match/strict-match` has `exact_match_stderr/strict-match`."""
    name, slash, chosen = metric.partition("/")
    return f"{name}_stderr{slash}{chosen}"


def shown(record: Record, task: str, metric: str) -> str:
    value = number(record, "tasks", task, metric)
    return "-" if math.isnan(value) else f"{value:.4g}"
