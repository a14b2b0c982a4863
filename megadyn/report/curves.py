"""Sections on everything with one number per step: losses, learning rate, gradients, speed, memory."""

from collections.abc import Sequence
from html import escape

import numpy as np

from megadyn.report.charts import COLOURS, Curve, Mark, line_chart
from megadyn.report.run import Run, Values

STYLES = (("", "dotted"), ("dashed", "mixed"))
"""Line styles of the first and second run: the usual one, and one for curves that would cover each other."""

MFU = {"mfu_causal_half": "causal attention at half", "mfu_whole_square": "attention's whole square"}
RECORDED = {
    "tokens_per_second_per_gpu": "tokens/s per device",
    "mfu_causal_half": "MFU",
    "dense_equivalent_tflops": "dense-equivalent TFLOP/s",
    "step_split_ms": "where a step's time goes",
    "memory_gib": "memory",
    "grad_norms": "gradient norm by component",
    "learning_rates": "learning rate by parameter group",
}
"""Fields that earlier runs did not record."""


class Over:
    """Charts of one run, or of two runs together."""

    def __init__(self, runs: Sequence[Run]):
        self.runs, self.several = runs, len(runs) > 1
        self.x_name, _ = axis_of(runs)

    def x(self, run: Run, iterations: Values) -> Values:
        return iterations if self.x_name == "iteration" else run.tokens_at(iterations)

    def named(self, run: Run, what: str) -> str:
        return f"{what}, {run.name}" if self.several else what

    def marks(self) -> list[Mark]:
        """Where the phases of a single run begin, but for the first."""
        phases = [] if self.several else self.runs[0].phases[1:]
        begins = self.x(self.runs[0], np.array([phase["begin"] for phase in phases], np.float64))
        return [Mark(float(x), str(phase["name"])) for x, phase in zip(begins, phases, strict=True)]

    def lines(
        self, title: str, curves: Sequence[Curve], *, from_zero: bool = False, named: bool = True
    ) -> str:
        """A chart over the axis of the runs."""
        return line_chart(
            title, curves, x_name=self.x_name, from_zero=from_zero, named=named, marks=self.marks()
        )

    def chart(self, title: str, *path: str, from_zero: bool = False) -> str:
        """One number per record; one curve per run."""
        found = [
            Curve(
                run.name if self.several else path[-1],
                self.x(run, run.iterations),
                run.values(*path),
                i,
                STYLES[i][0],
            )
            for i, run in enumerate(self.runs)
        ]
        return self.lines(title, found, from_zero=from_zero, named=self.several)

    def parts(self, title: str, *path: str, from_zero: bool = False) -> str:
        """One chart per run of the numbers at `path` in each record, without those that are always 0."""
        charts = []
        for run in self.runs:
            values = {name: run.values(*path, name) for name in run.keys_under(*path)}
            kept = {name: y for name, y in values.items() if np.nan_to_num(y).any()}
            charts.append(
                self.lines(
                    self.named(run, title),
                    [
                        Curve(
                            name.replace("_", " "),
                            self.x(run, run.iterations),
                            y,
                            i % COLOURS,
                            STYLES[i // COLOURS][0],
                        )
                        for i, (name, y) in enumerate(kept.items())
                    ],
                    from_zero=from_zero,
                )
            )
        return "".join(charts)


def axis_of(runs: Sequence[Run]) -> tuple[str, list[float]]:
    """What the x axis counts, and how many of it one iteration of each run is: tokens if runs have different steps."""
    steps = [float(run.tokens_at(np.array([1.0]))[0]) if run.training else 0.0 for run in runs]
    if len(runs) == 1 or len(set(steps)) == 1 or not all(step > 0 for step in steps):
        return "iteration", [1.0] * len(runs)
    return "tokens", steps


def loss_section(runs: Sequence[Run]) -> str:
    over, losses = Over(runs), []
    for i, run in enumerate(runs):
        losses.append(
            Curve(
                over.named(run, "training"),
                over.x(run, run.iterations),
                run.values("lm_loss"),
                0,
                STYLES[i][0],
            )
        )
        for colour, (dataset, mode, shown) in enumerate(
            (
                ("validation", "topk", "validation, top-k"),
                ("validation", "causal", "validation, causal"),
                ("test", "topk", "test, top-k"),
                ("test", "causal", "test, causal"),
            ),
            start=1,
        ):
            at, values = run.evaluated(dataset, mode)
            losses.append(
                Curve(over.named(run, shown), over.x(run, at), values, colour, STYLES[i][mode == "causal"])
            )
    charts = [over.lines("Loss (nats per token)", losses)]
    charts += [chart for title, *mode in BY_SET for chart in set_charts(over, title, *mode)]
    charts += [
        over.chart(f"Auxiliary loss: {name}, unweighted", "aux_losses", name)
        for name in dict.fromkeys(name for run in runs for name in run.auxiliary())
    ]
    return section("Loss", runs, charts)


BY_SET = (
    ("Validation loss by set, top-k (nats per token)", "topk"),
    ("Validation loss by set, causal (nats per token)", "causal"),
    ("Validation by set, causal (bits per byte)", "bits_per_byte", "causal"),
)
"""Title of a chart with one curve per validation set that has a name, and where its numbers are in the records."""


def set_charts(over: Over, title: str, *mode: str) -> list[str]:
    """One chart for each run that has such sets."""
    charts = []
    for run in over.runs:
        found = [(name.partition("/")[2], *run.evaluated(name, *mode)) for name in run.named_sets]
        curves = [
            Curve(name, over.x(run, at), values, i % COLOURS, STYLES[i // COLOURS % len(STYLES)][0])
            for i, (name, at, values) in enumerate(found)
            if np.isfinite(values).any()
        ]
        if curves:
            charts.append(over.lines(over.named(run, title), curves))
    return charts


def optimization_section(runs: Sequence[Run]) -> str:
    over = Over(runs)
    charts = [
        over.chart("Learning rate", "learning_rate"),
        over.chart("Gradient norm", "grad_norm"),
        over.parts("Gradient norm by component", "grad_norms"),
    ]
    if any(
        len({run.values("learning_rates", name)[-1] for name in run.keys_under("learning_rates")}) > 1
        for run in runs
    ):
        charts.append(over.parts("Learning rate by parameter group", "learning_rates"))
    return section("Learning rate and gradients", runs, charts)


def speed_section(runs: Sequence[Run]) -> str:
    over, mfu = Over(runs), []
    for i, run in enumerate(runs):
        for colour, (key, shown) in enumerate(MFU.items()):
            mfu.append(
                Curve(
                    over.named(run, shown), over.x(run, run.iterations), run.values(key), colour, STYLES[i][0]
                )
            )
    charts = [
        over.chart("Throughput (tokens/s)", "tokens_per_second", from_zero=True),
        over.chart("Tokens/s per device", "tokens_per_second_per_gpu", from_zero=True),
        over.chart("Model TFLOP/s per device", "model_tflops", from_zero=True),
        over.chart(
            "TFLOP/s per device that a dense model needs to be as fast",
            "dense_equivalent_tflops",
            from_zero=True,
        ),
        over.lines("MFU: share of the device's peak", mfu, from_zero=True),
        over.chart("Time of a step (ms)", "step_time_ms", from_zero=True),
        over.parts(
            "Where the time of the reported step goes (ms, mean over ranks)", "step_split_ms", from_zero=True
        ),
        *(
            [over.parts("Own time of a rank in the reported step (ms)", "rank_time_ms", from_zero=True)]
            if any(run.keys_under("rank_time_ms") for run in runs)
            else []
        ),
        over.chart("Time per step spent waiting for data (ms)", "data_time_ms", from_zero=True),
        over.parts("Memory of the rank that uses most (GiB)", "memory_gib", from_zero=True),
    ]
    return section("Speed and memory", runs, charts) + "".join(
        not_recorded(run, over.several) for run in runs
    )


def section(title: str, runs: Sequence[Run], charts: Sequence[str]) -> str:
    missing = "" if any(run.training for run in runs) else "<p>No training step was logged yet.</p>"
    return f'<h2>{title}</h2>{missing}<div class="grid-of">{"".join(charts)}</div>'


def not_recorded(run: Run, several: bool) -> str:
    """A sentence on missing charts and the reason."""
    if not run.training:
        return ""
    missing = [shown for key, shown in RECORDED.items() if not any(key in record for record in run.training)]
    sentences = []
    if missing:
        by = f"run {run.name}" if several else "this run"
        sentences.append(f"Not recorded by {by}: {', '.join(missing)}.")
    if "MFU" not in missing and not np.isfinite(run.values("mfu_causal_half")).any():
        sentences.append(
            f"No MFU{' of run ' + run.name if several else ''}: the peak of its device is unknown "
            "(set logging.peak_tflops)."
        )
    return f'<p class="dim">{escape(" ".join(sentences))}</p>' if sentences else ""
