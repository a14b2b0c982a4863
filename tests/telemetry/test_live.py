"""The live view on a terminal of 80 columns, as an emulator shows it."""

import io
import logging
import sys

import pytest
from rich.console import Console

from megadyn.log import log, start_logging
from megadyn.telemetry.live import LiveView, curve, open_live_view, report_lines
from tests.helpers.tiny import tiny_config

pyte = pytest.importorskip("pyte")

SPLIT = {
    "data": 1.0,
    "forward": 30.0,
    "backward": 50.0,
    "communication": 15.0,
    "optimizer": 4.0,
    "other": 0.001,
}


def record(iteration: int, layers: int = 4, **changes) -> dict:
    return {
        "iteration": iteration,
        "lm_loss": 5.0 - iteration / 10,
        "aux_losses": {"prior": 0.012},
        "grad_norm": 1.25,
        "learning_rate": 3e-4,
        "learning_rates": {"base": 3e-4, "router": 3e-3},
        "tokens_per_second": 45678.9,
        "tokens_per_second_per_gpu": 5709.9,
        "dense_equivalent_tflops": 350.0,
        "model_tflops": 312.4,
        "mfu_causal_half": 0.412,
        "mfu_whole_square": 0.451,
        "step_split_ms": SPLIT,
        "memory_gib": {"allocated_peak": 61.25},
        "routing": {str(layer): {"routed_fraction": 0.5} for layer in range(1, layers, 2)},
    } | changes


def terminal_screen(monkeypatch: pytest.MonkeyPatch) -> "pyte.HistoryScreen":
    """What a terminal shows of all that is printed, logged or drawn from here. No fixture: pytest sets standard output anew
    after those."""
    screen = pyte.HistoryScreen(80, 24, history=500)
    terminal = pyte.Stream(screen)

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            terminal.feed(text.replace("\n", "\r\n"))  # as the terminal's driver does
            return len(text)

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Output())
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return screen


def shown(screen) -> list[str]:
    past = ["".join(line[column].data for column in range(80)) for line in screen.history.top]
    return [line.rstrip() for line in [*past, *screen.display] if line.strip()]


def test_lines_scroll_by_above_the_view(monkeypatch):
    screen = terminal_screen(monkeypatch)
    start_logging()
    config = tiny_config(iterations=40)
    view = open_live_view(config)
    log.info("attention: sdpa [bold](auto)[/bold] :smile:")  # no markup
    for iteration in range(1, 41):
        view.step(iteration)
        view.train(record(iteration), 60.0)
        log.info("line %d", iteration)
        print("printed", iteration, file=sys.stderr)
    view.close()
    log.info("after it")
    lines = shown(screen)
    assert lines[0] == "attention: sdpa [bold](auto)[/bold] :smile:"
    assert lines[1:81] == [line for k in range(1, 41) for line in (f"line {k}", f"printed {k}")]
    assert lines[81].startswith("40 of 40 ━━━") and "left 1m00s" in lines[81] and "left 59s" not in lines[81]
    assert lines[82:] == [
        "loss 1.0000 ██▇▇▇▆▆▆▆▅▅▅▄▄▄▃▃▃▃▂▂▂▁▁  prior 0.012  gradient norm 1.25",
        "learning rate base 3.00e-04  router 3.00e-03",
        "45.7k tokens/s, 5,710 per device, for which a dense model needs 350 TFLOP/s",
        "312 TFLOP/s per device  MFU 41.2% (causal half), 45.1% (whole square)",
        "a step's 100 ms: data 1% forward 30% backward 50% communication 15% optimizer 4%",
        "memory, GiB: allocated peak 61.2",
        "tokens routed, by layer: 1:50%  3:50%",
        "after it",
    ]
    assert not screen.cursor.hidden


def test_a_logger_of_before_does_not_write_into_the_view(monkeypatch):
    screen = terminal_screen(monkeypatch)
    handler, other = logging.StreamHandler(sys.stdout), logging.getLogger("of another package")
    monkeypatch.setattr(other, "handlers", [handler])
    view = open_live_view(tiny_config(iterations=40))
    view.train(record(1), 60.0)
    other.warning("first")
    view.train(record(2), 60.0)
    other.warning("second")
    view.close()
    assert handler.stream is sys.stdout
    lines = shown(screen)
    assert lines[:2] == ["first", "second"] and lines[2].startswith("2 of 40") and len(lines) == 10


def test_errors_that_go_elsewhere_still_go_there(monkeypatch):
    screen = terminal_screen(monkeypatch)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    view = open_live_view(tiny_config())
    print("an error", file=sys.stderr)
    view.close()
    assert sys.stderr.getvalue() == "an error\n"
    assert "error" not in "".join(shown(screen))


def test_a_view_that_is_killed_leaves_the_cursor(monkeypatch):
    screen = terminal_screen(monkeypatch)
    view = open_live_view(tiny_config())
    view.step(1)
    assert not screen.cursor.hidden
    view.close()


def test_a_deep_model_fits_a_small_terminal(monkeypatch):
    screen = terminal_screen(monkeypatch)
    view = open_live_view(tiny_config(iterations=10))
    view.train(record(1, layers=96), 10.0)
    print("above")
    view.train(record(2, layers=96), 10.0)
    view.close()
    lines = shown(screen)
    assert lines[0] == "above" and lines[1].startswith("2 of 10") and len(lines) < 20
    assert lines[-1].endswith("95:50%")


def test_what_is_not_there_is_not_shown():
    dense = record(1, layers=0, mfu_causal_half=None, mfu_whole_square=None, aux_losses={})
    for name in ("step_split_ms", "memory_gib", "learning_rates"):
        del dense[name]
    text = "\n".join(line.plain for line in report_lines(dense, [1.0]))
    assert not any(word in text for word in ("MFU", "routed", "memory", "prior", "a step's"))
    assert "learning rate 3.00e-04" in text


@pytest.mark.parametrize(
    ("setting", "is_terminal", "kind", "is_live"),
    [
        ("auto", True, "xterm", True),
        ("auto", True, "dumb", False),
        ("auto", False, "xterm", False),
        ("always", False, "xterm", True),
        ("never", True, "xterm", False),
    ],
)
def test_the_view_is_for_terminals_or_as_asked(monkeypatch, setting, is_terminal, kind, is_live):
    class Output(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    terminal_screen(monkeypatch)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(sys, "stdout", Output())
    config = tiny_config()
    config.logging.live = setting
    view = open_live_view(config)
    assert (view is not None) == is_live
    if view is not None:
        view.close()


def test_steps_between_reports_renew_it_a_few_times_a_second(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("megadyn.telemetry.live.time.monotonic", lambda: now[0])
    output = io.StringIO()
    view = LiveView(tiny_config(iterations=9000), Console(file=output, force_terminal=True, width=80))
    drawn = 0
    for iteration in range(1000):
        now[0] += 0.01
        before = output.tell()
        view.step(iteration)
        drawn += output.tell() > before
    view.close()
    assert 30 <= drawn <= 45  # of 10 seconds


def test_a_curve_goes_from_its_lowest_to_its_highest():
    assert curve([1.0, 2.0, 1.5]) == "▁█▅"
    assert curve([2.0, 2.0]) == "▁▁"
