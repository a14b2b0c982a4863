"""A live view of the run at the bottom of the terminal, with log lines scrolling above it. Rank 0 only."""

import logging
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megadyn import progress
from megadyn.config import Config
from megadyn.progress import duration
from megadyn.telemetry.lines import routed_share, short

BARS = "▁▂▃▄▅▆▇█"
CURVE_REPORTS = 24
"""Number of losses in the small curve."""
RENEWED_S = 0.25
"""Shortest time between two updates for steps without a report."""
STYLES = {
    "data": "yellow",
    "forward": "green",
    "backward": "cyan",
    "communication": "magenta",
    "optimizer": "blue",
    "other": "bright_black",
}


class Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Overrides rich, which would end the process."""
        raise


def open_live_view(config: Config) -> "LiveView | None":
    """The view if `logging.live` asks for it and the terminal can move its cursor; otherwise None, which means log lines."""
    if config.logging.live == "always":
        return LiveView(config, Terminal(force_terminal=True, highlight=False))
    console = Terminal(highlight=False)
    is_wanted = config.logging.live == "auto" and console.is_terminal and not console.is_dumb_terminal
    return LiveView(config, console) if is_wanted else None


class LiveView:
    """Shows the last report and the progress since then. While it is open, all other output is printed above it."""

    def __init__(self, config: Config, console: Console):
        """Opens the view, until `close`."""
        self.iterations = config.last_iteration
        self.record: dict[str, Any] = {}
        self.losses: deque[float] = deque(maxlen=CURVE_REPORTS)
        self.iteration, self.ends_at, self._drawn = 0, 0.0, 0.0
        self.live = Live(console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        terminal = sys.stdout, sys.stderr
        self.live.start()
        progress.taken.set()
        # Loggers that were set up before, as DeepSpeed's, hold the terminal itself.
        self.moved = [
            (handler, handler.stream) for handler in stream_handlers() if handler.stream in terminal
        ]
        for handler, stream in self.moved:
            handler.setStream(sys.stdout if stream is terminal[0] else sys.stderr)
        self.live.console.show_cursor(True)  # so that a killed run does not leave a hidden cursor

    def step(self, iteration: int) -> None:
        self.iteration = iteration
        if time.monotonic() - self._drawn > RENEWED_S:
            self._draw()

    def train(self, record: dict[str, Any], seconds_left: float) -> None:
        self.record, self.iteration = record, record["iteration"]
        self.losses.append(record["lm_loss"])
        self.ends_at = time.monotonic() + seconds_left
        self._draw()

    def close(self) -> None:
        """Closes the view; the last report stays visible."""
        self._draw()
        self.live.stop()
        self._give_back()

    def abandon(self) -> None:
        """Closes the view after the terminal has gone, without drawing."""
        with suppress(OSError):
            self.live.stop()
        self._give_back()

    def _give_back(self) -> None:
        progress.taken.clear()
        for handler, stream in self.moved:
            handler.setStream(stream)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        left = max(0.0, self.ends_at - self._drawn) if self.record else float("inf")
        lines = [progress_bar(self.iteration, self.iterations, left)]
        if self.record:
            lines += report_lines(self.record, list(self.losses))
        self.live.update(Group(*lines), refresh=True)


def stream_handlers() -> list[logging.StreamHandler[Any]]:
    """Stream handlers of all loggers, except those that always use the current `sys.stdout` or `sys.stderr`."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return [
        handler
        for one in loggers
        if isinstance(one, logging.Logger)
        for handler in one.handlers
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler)
    ]


def progress_bar(iteration: int, iterations: int, seconds_left: float, width: int = 30) -> Text:
    share = iteration / max(1, iterations)
    full = int(share * width)
    return Text.assemble(
        (f"{iteration:,} of {iterations:,} ", "bold"),
        ("━" * full, "green"),
        ("━" * (width - full), "bright_black"),
        f" {share:.1%}  left {duration(seconds_left)}",
    )


def report_lines(record: dict[str, Any], losses: list[float]) -> list[Text]:
    """A record of a training step, as lines that the terminal may wrap."""
    norm, mfu = record["grad_norm"], record.get("mfu_causal_half")
    aux = "".join(f"  {name} {value:.2g}" for name, value in record["aux_losses"].items())
    rates = record.get("learning_rates") or {"": record["learning_rate"]}
    lines = [
        Text(f"loss {record['lm_loss']:.4f} {curve(losses)}{aux}  gradient norm {norm:.3g}"),
        Text("learning rate " + "  ".join(f"{name} {rate:.2e}".strip() for name, rate in rates.items())),
        Text(
            f"{short(record['tokens_per_second'])} tokens/s, {short(record['tokens_per_second_per_gpu'])} per device, "
            f"for which a dense model needs {record['dense_equivalent_tflops']:.3g} TFLOP/s"
        ),
        Text(
            f"{record['model_tflops']:.3g} TFLOP/s per device"
            + (
                f"  MFU {mfu:.1%} (causal half), {record['mfu_whole_square']:.1%} (whole square)"
                if mfu is not None
                else ""
            )
        ),
    ]
    if split := record.get("step_split_ms"):
        lines.append(split_line(split))
    if memory := record.get("memory_gib"):
        lines.append(
            Text(
                "memory, GiB: "
                + "  ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in memory.items())
            )
        )
    if routed_share(record) is not None:
        shares = {
            layer: found["routed_fraction"]
            for layer, found in record["routing"].items()
            if "routed_fraction" in found
        }
        lines.append(
            Text(
                "tokens routed, by layer: "
                + "  ".join(f"{layer}:{share:.0%}" for layer, share in shares.items())
            )
        )
    return lines


def split_line(split: dict[str, float]) -> Text:
    """Parts of a step's time as shares; those that round to zero are left out."""
    whole = sum(split.values())
    line = Text(f"a step's {whole:,.0f} ms:")
    for name, spent in split.items():
        if spent / whole >= 0.005:
            line.append(f" {name} {spent / whole:.0%}", STYLES[name])
    return line


def curve(values: list[float]) -> str:
    """One bar per value, scaled from the lowest to the highest."""
    low, high = min(values), max(values)
    return "".join(
        BARS[int((value - low) / (high - low) * (len(BARS) - 1) + 0.5) if high > low else 0]
        for value in values
    )
