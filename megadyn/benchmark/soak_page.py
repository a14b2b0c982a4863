"""A soak as a page: a picture of what each router did, and a sentence of what is seen."""

import math
import statistics
from pathlib import Path
from typing import Any

from megadyn.benchmark.soak_bounds import SCALARS, Soaked, late
from megadyn.errors import UserError

WIDTH, HEIGHT = 3.4, 2.3
"""Inches of one panel."""
LINES = {"fp32": "-", "bf16": ":", "tensor2": "--", "muon": "-."}
"""By setup."""
PANELS: dict[str, tuple[str, ...]] = {
    "share of tokens": ("routed_fraction", "causal_fraction"),
    "gate": ("gate_routed", "gate_unrouted"),
    "threshold": ("threshold",),
    "causal agreement": ("causal_agreement",),
    "scalars": (*(name for name in SCALARS if name != "threshold"), "S_CE", "S_CU"),
}
"""Title: the statistics that a panel shows, means over the layers that have them."""
SAYS = {
    "routed_fraction": "share",
    "gate_routed": "gate of chosen tokens",
    "gate_unrouted": "of the others",
    "threshold": "threshold",
    "causal_fraction": "causal share",
    "causal_agreement": "causal agreement",
    "lambda": "lambda",
    "ce_log_offset": "log offset",
    "logit_std": "deviation of logits",
    "lead_std": "deviation of logit differences",
}
"""What the sentences tell of, and its name there."""


def write_page(found: dict[str, Soaked], path: Path, table: str, command: str) -> None:
    """Writes PATH.md and PATH.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(found, path.with_suffix(".png"))
    steps = max(soaked.steps for soaked in found.values())
    minutes = sum(soaked.seconds for soaked in found.values()) / 60
    path.with_suffix(".md").write_text(
        "\n".join(
            [
                f"# Soak: {steps:,} steps of every kind of routing",
                "",
                f"    {command}",
                "",
                f"{minutes:.0f} minutes for {len(found)} runs. Bounds: `megadyn/benchmark/soak_bounds.py`. "
                "FAIL is an edge, or a promise that is broken; WARN a router that works but drifts.",
                "",
                table,
                "",
                "## What is seen",
                "",
                "From early on (a tenth of the run) to the end (its last fifth), means over layers.",
                "",
                f"![curves]({path.stem}.png)",
                "",
                *(f"- **{name}**: {sentence(soaked)}" for name, soaked in found.items()),
            ]
        )
        + "\n"
    )


def sentence(soaked: Soaked) -> str:
    parts = [f"loss {between(soaked.curves.loss)}"]
    for name, says in SAYS.items():
        values = mean_over_layers(soaked, name)
        if values:
            parts.append(f"{says} {between(values)}")
    return "; ".join(parts) + "." + (f" It ended early: {soaked.ended}." if soaked.ended else "")


def between(values: list[float]) -> str:
    early = values[len(values) // 10] if values else math.nan
    return f"{early:.3g} to {late(values):.3g}"


def mean_over_layers(soaked: Soaked, name: str) -> list[float]:
    layers = list(soaked.by_layer(name).values())
    return [sum(values) / len(values) for values in zip(*layers)]


def draw(found: dict[str, Soaked], path: Path) -> None:
    """A row for each rule, a column for each panel, behind the losses; a line style for each setup."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--page needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rules = list(
        dict.fromkeys(soaked.rule for soaked in found.values() if not soaked.rule.startswith("dense"))
    )
    figure, axes = pyplot.subplots(
        max(1, len(rules)),
        1 + len(PANELS),
        squeeze=False,
        layout="constrained",
        figsize=(WIDTH * (1 + len(PANELS)), HEIGHT * max(1, len(rules))),
    )
    for row, rule in zip(axes, rules):
        draw_losses(row[0], rule, found)
        for panel, (title, names) in zip(row[1:], PANELS.items()):
            draw_panel(panel, title, names, [soaked for soaked in found.values() if soaked.rule == rule])
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def draw_losses(panel: Any, rule: str, found: dict[str, Soaked]) -> None:
    """The rule's loss minus that of the dense model, step by step, as the batches are the same; in grey that of half depth."""
    for name, soaked in found.items():
        setup = name.partition("/")[2]
        dense = found.get(f"dense/{setup}")
        if soaked.rule not in (rule, "dense-half") or dense is None:
            continue
        steps = [*zip(soaked.curves.iterations, soaked.curves.loss, dense.curves.loss)]
        above = smoothed([loss - of_dense for _, loss, of_dense in steps])
        is_own = soaked.rule == rule
        panel.plot(
            [iteration for iteration, _, _ in steps],
            above,
            LINES[setup],
            color="tab:blue" if is_own else "0.7",
            lw=1,
            label=name if is_own else None,
            zorder=2 if is_own else 1,
        )
    panel.set_title(f"{rule}: loss above dense (grey: half depth)", fontsize=8)
    finish(panel)


def smoothed(values: list[float], width: int = 5) -> list[float]:
    """The mean of each value and its neighbours, `width` of them but at the ends."""
    half = width // 2
    return [statistics.fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def draw_panel(panel: Any, title: str, names: tuple[str, ...], cases: list[Soaked]) -> None:
    colors: dict[str, str] = {}
    for soaked in cases:
        setup = soaked.name.partition("/")[2]
        for name in names:
            values = mean_over_layers(soaked, name)
            if values:
                color = colors.setdefault(name, f"C{len(colors)}")
                panel.plot(
                    soaked.curves.iterations[: len(values)],
                    values,
                    LINES[setup],
                    color=color,
                    lw=1,
                    label=name if setup == "fp32" or len(cases) == 1 else None,
                )
    if not panel.lines:
        panel.set_axis_off()  # this rule has no such statistic
        return
    panel.set_title(title, fontsize=8)
    finish(panel)


def finish(panel: Any) -> None:
    panel.tick_params(labelsize=6)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=6)
