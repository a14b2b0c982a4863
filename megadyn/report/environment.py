"""Sections on the environment of a run: its own record, and the differences between two."""

import platform
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import megadyn
from megadyn.report.run import Run, differences, flat

NOT_COMPARED = ("started", "iteration", "iterations", "command")


def environment_rows(run: Run, topology: dict[str, int]) -> list[tuple[str, str]]:
    """For the newest start; `topology` is the newest checkpoint's."""
    rows: list[tuple[str, str]] = []
    if topology:
        rows.append(("ranks", f"{layout(topology)} (of the newest checkpoint)"))
    rows += [
        (name, str(run.config[key]))
        for name, key in (
            ("precision", "precision"),
            ("attention", "model.attention"),
            ("DeepSpeed settings", "deepspeed_config"),
            ("output folder", "output_dir"),
        )
        if key in run.config
    ]
    if not run.starts:
        rows.append(
            ("versions of Python, torch, DeepSpeed; devices, hosts, variables", "not recorded by the run")
        )
    else:
        rows += start_rows(run.starts[-1])
        rows.append(
            (
                "starts",
                "; ".join(
                    f"iteration {start.get('iteration', '?')} at {start.get('started', '?')}"
                    for start in run.starts
                ),
            )
        )
    rows.append(
        (
            "where this page was made",
            f"megadyn {megadyn.__version__}, Python {platform.python_version()}, torch {installed('torch')}",
        )
    )
    return rows


def start_rows(start: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for a record of environment.jsonl; missing fields are shown as not recorded."""

    def listed(key: str, form: str) -> str:
        found = start.get(key)
        if not isinstance(found, dict):
            return "not recorded"
        return (
            ", ".join(
                form.format(name=name, value="not known" if value is None else value)
                for name, value in found.items()
            )
            or "none"
        )

    return [
        ("versions", listed("versions", "{name} {value}")),
        ("devices", listed("devices", "{value} x {name}")),
        ("hosts", listed("hosts", "{name} ({value} ranks)")),
        ("layout", listed("world", "{name} {value}")),
        ("variables", listed("variables", "{name}={value}")),
        ("system", str(start.get("platform", "not recorded"))),
    ]


def layout(topology: dict[str, int]) -> str:
    return (
        " x ".join(f"{name} {size}" for name, size in topology.items() if name != "zero")
        + f", ZeRO-{topology.get('zero', '?')}"
    )


def environment_section(run: Run, topology: dict[str, int], name: str) -> str:
    """`name` is appended to the heading."""
    table = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>"
        for key, value in environment_rows(run, topology)
    )
    return f'<h2>Environment{name}</h2><div class="card wide"><table>{table}</table></div>'


def environment_differences(runs: Sequence[Run]) -> str:
    """A table of the differences between the newest starts of two runs; empty for one run."""
    if len(runs) < 2:
        return ""
    first, second = runs
    if not (first.starts and second.starts):
        return "<p>The environments cannot be compared: not recorded by both runs.</p>"
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(a)}</td><td>{escape(b)}</td></tr>"
        for key, a, b in differences(comparable(first), comparable(second))
    )
    return difference_table(rows, first.name, second.name) if rows else "<p>The environments are equal.</p>"


def difference_table(rows: str, first: str, second: str) -> str:
    return (
        f'<div class="card wide"><table class="differences"><tr><th>differs</th><th>{escape(first)}</th>'
        f"<th>{escape(second)}</th></tr>{rows}</table></div>"
    )


def comparable(run: Run) -> dict[str, Any]:
    return flat({key: value for key, value in run.starts[-1].items() if key not in NOT_COMPARED})


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
