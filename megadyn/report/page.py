"""The page: one self-contained HTML file. Each section is a function of the run, or of the two runs that are compared."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megadyn.kinds import Kind
from megadyn.report.axes import bin_means, brief, spans_decades
from megadyn.report.charts import HEAT_COLUMNS, Curve, heat_map, line_chart
from megadyn.report.curves import MFU, STYLES, loss_section, optimization_section, speed_section
from megadyn.report.environment import difference_table, environment_differences, environment_section
from megadyn.report.phases import phase_section
from megadyn.report.run import Checkpoint, Run, Values, differences
from megadyn.report.tasks import tasks_section

if TYPE_CHECKING:
    from megadyn.report.text_map import TextMap

HERE = Path(__file__).parent
NOTHING_LOADED = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy: the page may load no file and contact no host."""


class LayerStatistic(NamedTuple):
    title: str
    bounds: tuple[float, float] | None = None
    """Bounds of the colour scale; None: those of the values."""


SHARE = (0.0, 1.0)
LAYER_STATISTICS = {
    "routed_fraction": LayerStatistic("Share of tokens routed", SHARE),
    "causal_agreement": LayerStatistic(
        "Causal agreement: share of tokens on which the causal rule and top-k agree", SHARE
    ),
}
"""Statistics of every kind, shown before those in the legend of the run's own kind. All other statistics are in a
collapsed part."""
GATES = ("gate_routed", "gate_unrouted")


class Subject(NamedTuple):
    """A run, and what was found out about it for the page."""

    run: Run
    checkpoints: list[Checkpoint] | None
    """None: not read."""
    text: "TextMap | str"
    """The map, or a sentence on why there is none."""
    text_from: str = ""
    """Name of the checkpoint that made the map."""


def page(subjects: Sequence[Subject]) -> str:
    runs = [subject.run for subject in subjects]
    title = " and ".join(run.name for run in runs)
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(head(subject.run, len(runs) > 1) for subject in subjects),
        *(phase_section(run, of(run, len(runs) > 1)) for run in runs),
        loss_section(runs),
        tasks_section(runs),
        optimization_section(runs),
        speed_section(runs),
        layers(runs),
        *(text_section(subject, len(runs) > 1) for subject in subjects),
        config_section(runs),
        *(environment(subject, len(runs) > 1) for subject in subjects),
        environment_differences(runs),
        *(checkpoint_section(subject, len(runs) > 1) for subject in subjects),
        *(events(run, len(runs) > 1) for run in runs),
        "<footer>Curves of more than 400 points keep the lowest and the highest value of each stretch; gates and heat maps show "
        "means of stretches. Training and evaluation figures are those of metrics.jsonl.</footer>",
    ]
    css, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_LOADED}"><title>{escape(title)}</title>'
        f"<style>{css}</style></head><body>\n"
        + "\n".join(parts)
        + f"\n<script>{script}</script></body></html>\n"
    )


def of(run: Run, several: bool) -> str:
    """Suffix of a heading that names the run, if there are two."""
    return f": {escape(run.name)}" if several else ""


def head(run: Run, several: bool) -> str:
    """The run in one line, and its latest figures."""
    name = f"<h3>{escape(run.name)}</h3>" if several else ""
    warnings = [f"Warned in training: {sentence}." for sentence in [*run.router_warnings, *run.slow_ranks]]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in [*run.notes, *warnings])
    return f'{name}<p class="dim">{escape(describe(run))}</p>{notes}<div class="facts">{"".join(facts(run))}</div>'


def describe(run: Run) -> str:
    get = run.config.get
    if not run.config:
        return str(run.folder)
    routing = run.routing
    kind = str(get("model.routing.kind", "?")) if routing is None else routing.describe()
    return (
        f"{kind}; {get('model.num_layers')} layers of {get('model.hidden_size')}, sequences of "
        f"{get('training.sequence_length')} tokens, {get('precision')}"
    )


def facts(run: Run) -> list[str]:
    def fact(name: str, value: str) -> str:
        return f"<div><span>{name}</span><b>{value}</b></div>"

    planned = run.planned_iterations
    found = [
        fact("iteration", f"{run.last_iteration:,}" + (f" of {planned:,}" if planned is not None else ""))
    ]
    for dataset in run.evaluations:
        for mode, shown in (("topk", "top-k"), ("causal", "causal")):
            _, losses = run.evaluated(dataset, mode)
            if np.isfinite(losses).any():
                found.append(fact(f"{escape(dataset)} loss, {shown}", f"{last(losses):.4f}"))
    for name, key, unit in (("training loss", "lm_loss", ""), ("tokens", "consumed_tokens", "")):
        if np.isfinite(run.values(key)).any():
            found.append(
                fact(
                    name,
                    f"{last(run.values(key)):.4f}"
                    if key == "lm_loss"
                    else brief(last(run.values(key))) + unit,
                )
            )
    for name, key in (
        ("tokens/s, median", "tokens_per_second"),
        ("tokens/s per device, median", "tokens_per_second_per_gpu"),
        ("model TFLOP/s per device, median", "model_tflops"),
        ("MFU, causal half, median", "mfu_causal_half"),
        ("MFU, whole square, median", "mfu_whole_square"),
    ):
        if np.isfinite(run.values(key)).any():
            median = float(np.nanmedian(run.values(key)))
            found.append(fact(name, f"{median:.1%}" if key in MFU else brief(median)))
    for name, key in (
        ("tokens routed, mean over layers", "routed_fraction"),
        ("causal agreement, mean over layers", "causal_agreement"),
    ):
        _, values = run.by_layer(key)
        if values.size and np.isfinite(values[:, -1]).any():
            found.append(fact(name, f"{np.nanmean(values[:, -1]):.1%}"))
    return found


def last(values: Values) -> float:
    """The last finite value."""
    return float(values[np.isfinite(values)][-1])


def layers(runs: Sequence[Run]) -> str:
    """Everything with one number per layer and step."""
    names = list(dict.fromkeys(name for run in runs for name in run.layer_statistics()))
    if not names:
        return (
            "<h2>Routing by layer</h2><p>There is nothing to show: no layer reported routing statistics, "
            "as in a dense model.</p>"
        )
    known = dict(LAYER_STATISTICS)
    for run in runs:
        known |= {
            name: LayerStatistic(title) for name, title in (run.routing.legend if run.routing else {}).items()
        }
    shown = {name: statistic for name, statistic in known.items() if name in names}
    gates = "".join(gate_charts(run, len(runs) > 1) for run in runs)
    others = [name for name in names if name not in known and not name.startswith(GATES)]
    parts = [
        '<h2>Routing by layer</h2><p class="dim">One row per layer. More is darker in light mode and lighter in '
        "dark mode. The number after a row is its last value.</p>",
        f'<div class="grid-of">{"".join(layer_maps(runs, name, *shown[name]) for name in shown)}</div>',
        gates,
    ]
    if others:
        maps = "".join(layer_maps(runs, name, name, None) for name in others)
        parts.append(
            f"<details><summary>Other statistics of the layers ({len(others)})</summary>"
            f'<div class="grid-of">{maps}</div></details>'
        )
    return "".join(parts)


def layer_maps(runs: Sequence[Run], name: str, title: str, bounds: tuple[float, float] | None) -> str:
    """One heat map per run, all with the same colour scale."""
    found = [(run, *run.by_layer(name)) for run in runs]
    drawn = [
        bin_means(run.iterations, values, HEAT_COLUMNS)[1].ravel() for run, layers, values in found if layers
    ]
    every = np.concatenate(drawn)
    every = every[np.isfinite(every)]
    if not every.size:
        return ""
    log = bounds is None and spans_decades(every)
    low, high = bounds or (float(every.min()), float(every.max()))
    return "".join(
        heat_map(
            f"{title} ({run.name})" if len(runs) > 1 else title,
            layers,
            run.iterations,
            values,
            x_name="iteration",
            low=low,
            high=high,
            log=log,
        )
        for run, layers, values in found
        if layers
    )


def gate_charts(run: Run, several: bool) -> str:
    """Gates of routed and unrouted tokens, one chart per layer, all with the same range; many records are averaged over
    stretches."""
    layers, _ = run.by_layer(GATES[0])
    curves: dict[int, list[Curve]] = {}
    reach = [np.zeros(0)]
    for layer in layers:
        for i, name in enumerate(GATES):
            both = np.array(
                [run.values("routing", str(layer), name), run.values("routing", str(layer), f"{name}_std")]
            )
            columns, (mean, spread) = bin_means(run.iterations, both, HEAT_COLUMNS)
            curves.setdefault(layer, []).append(
                Curve(name.removeprefix("gate_"), columns, mean, i, STYLES[i][0], spread)
            )
            reach += [mean - np.nan_to_num(spread), mean + np.nan_to_num(spread)]
    every = np.concatenate(reach)
    every = every[np.isfinite(every)]
    if not every.size:
        return ""
    limits = float(every.min()), float(every.max())
    charts = (
        line_chart(f"Layer {layer}", found, x_name="iteration", y_range=limits)
        for layer, found in curves.items()
    )
    return (
        f'<h3>Gates{of(run, several)}</h3><p class="dim">Mean of the gate over routed and over other tokens, '
        f"with a band of one standard deviation; all layers have the same range.</p>"
        f'<div class="grid-of">{"".join(charts)}</div>'
    )


def text_section(subject: Subject, several: bool) -> str:
    heading = f"<h2>A validation text, token by token{of(subject.run, several)}</h2>"
    found = subject.text
    if isinstance(found, str):
        return f"{heading}<p>Not available: {escape(found)}.</p>"
    counts, total = found.processed.sum(axis=0), len(found.layers)
    did = Kind.verb if subject.run.routing is None else subject.run.routing.verb
    spans = []
    for k, piece in enumerate(found.pieces):
        through = [str(layer) for layer, chosen in zip(found.layers, found.processed[:, k]) if chosen]
        hint = f"{piece!r}: {did} in {len(through)} of {total} routed layers" + (
            f" ({', '.join(through)})" if through else ""
        )
        steps = ""
        if found.following:
            name, needed = found.following[k]
            hint += f"; predicts {name}, {needed} step{'s' * (needed != 1)}"
            steps = f"<sub>{needed}</sub>" if needed else ""
        spans.append(
            f'<b style="--k:{shade(counts[k], total):.2g}" title="{escape(hint)}">{visible(piece)}{steps}</b>'
        )
    labelled = " The number beside a token is how many steps predicting the next one takes." * bool(
        found.following
    )
    scale = "".join(
        f'<span class="swatch" style="--k:{shade(k, total):.2g}">{k}</span>' for k in shown_counts(total)
    )
    shares = ", ".join(
        f"{layer}: {share:.0%}" for layer, share in zip(found.layers, found.processed.mean(axis=1))
    )
    return (
        f"{heading}<p>The first {len(found.pieces):,} tokens of the first validation sample, run through "
        f"{escape(subject.text_from)} with causal routing, as in generation; their mean loss is {found.loss:.3f}. A token's "
        f"colour shows in how many of the {total} routed layers it {did}; point at it to see which.{labelled}</p>"
        f'<p class="dim">Share of these tokens routed, by layer: {shares}.</p><div class="card">'
        f'<div class="legend">routed layers: {scale}</div><p class="text">{"".join(spans)}</p><output>&nbsp;</output></div>'
    )


def shade(count: int, total: int) -> float:
    """0 for no layer, 1 for all; for one layer enough to be visible."""
    return 0.2 + 0.8 * count / total if count else 0.0


def shown_counts(total: int) -> list[int]:
    """At most nine numbers from 0 to `total`."""
    return sorted({round(k * total / min(total, 8)) for k in range(min(total, 8) + 1)})


def visible(piece: str) -> str:
    """A token's text as HTML that makes spaces, line ends and control characters visible."""
    if not piece:
        return "<i>▫</i>"  # the first bytes of a character that the next token completes
    return "".join(_visible(character) for character in piece)


def _visible(character: str) -> str:
    if character == "\n":
        return "<i>↵</i>\n"
    if character == "\t":
        return "<i>→</i>\t"
    if character == " ":
        return "<i>·</i><wbr>"
    if ord(character) < 32 or ord(character) == 127:
        return f"<i>{chr(0x2400 + ord(character)) if character != chr(127) else '␡'}</i>"
    return escape(character)


def config_section(runs: Sequence[Run]) -> str:
    parts = ["<h2>Configuration</h2>"]
    if len(runs) > 1 and all(run.config for run in runs):
        first, second = runs
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td>{escape(a)}</td><td>{escape(b)}</td></tr>"
            for key, a, b in differences(first.config, second.config)
        )
        parts.append(difference_table(rows, first.name, second.name) if rows else "<p>The two are equal.</p>")
    for run in runs:
        if run.config_text is None:
            parts.append(f"<p>Not available{of(run, len(runs) > 1)}: config.yaml cannot be read.</p>")
        else:
            parts.append(
                f"<details><summary>config.yaml, as resolved{of(run, len(runs) > 1)}</summary>"
                f'<div class="card"><pre>{escape(run.config_text)}</pre></div></details>'
            )
    return "".join(parts)


def environment(subject: Subject, several: bool) -> str:
    topology = next(
        (checkpoint.topology for checkpoint in subject.checkpoints or () if checkpoint.topology), {}
    )
    return environment_section(subject.run, topology, of(subject.run, several))


def checkpoint_section(subject: Subject, several: bool) -> str:
    heading = f"<h2>Checkpoints{of(subject.run, several)}</h2>"
    if subject.checkpoints is None:
        return f"{heading}<p>Not read (--no-checkpoints).</p>"
    if not subject.checkpoints:
        return f"{heading}<p>The run folder holds none.</p>"
    rows = "".join(
        f'<tr><td class="number">{one.iteration:,}</td><td class="number">{size(one.bytes)}</td>'
        f"<td>{state(one, subject.run.folder)}</td></tr>"
        for one in subject.checkpoints
    )
    return f'{heading}<div class="card wide"><table><tr><th>iteration</th><th>size</th><th>state</th></tr>{rows}</table></div>'


def state(one: Checkpoint, run: Path) -> str:
    found = (
        "intact: the sha256 of every file matches"
        if one.problem is None
        else f"damaged: {one.problem.replace(f'{run}/', '')}"
    )
    if one.best:
        found += f"; the best by its loss on {one.best[0]}: {one.best[1]:.4f}"
    return escape(found + ("" if one.is_used else "; not used: the run has since gone back before it"))


def size(count: float) -> str:
    """Bytes in decimal units: `57.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def events(run: Run, several: bool) -> str:
    """Records of neither a step nor an evaluation."""
    if not run.events:
        return ""
    rows = []
    for record in run.events:
        what = "; ".join(
            f"{key}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in record.items()
            if key != "iteration"
        )
        rows.append(f'<tr><td class="number">{record["iteration"]:,}</td><td>{escape(what)}</td></tr>')
    return (
        f'<h2>Events{of(run, several)}</h2><div class="card wide"><table><tr><th>iteration</th><th>event</th></tr>'
        f"{''.join(rows)}</table></div>"
    )
