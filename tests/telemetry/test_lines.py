"""Reports as text."""

import math

import pytest

from megadyn.progress import duration
from megadyn.telemetry.lines import evaluation_line, tasks_line, train_line
from tests.telemetry.test_telemetry import ROUTING


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (9, "9s"),
        (59.4, "59s"),
        (59.5, "1m00s"),
        (247, "4m07s"),
        (3599, "59m59s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (3 * 86400 + 4 * 3600 + 59, "3d04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_a_duration_shows_its_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


def record(**changes) -> dict:
    return {
        "iteration": 120,
        "lm_loss": 3.14159,
        "aux_losses": {"prior": 0.01234},
        "grad_norm": 0.987,
        "routing": ROUTING,
        "tokens_per_second": 45678.9,
        "model_tflops": 1.2345,
    } | changes


def test_an_evaluation_line_shows_bits_per_byte_where_they_are_known():
    losses = {"topk": 2.0, "causal": 2.25}
    assert (
        evaluation_line(5, 10, "validation", losses) == " 5/10  validation loss  topk 2.0000  causal 2.2500"
    )
    assert evaluation_line(5, 10, "validation/code", losses, {"topk": 1.0, "causal": 1.5}) == (
        " 5/10  validation/code loss  topk 2.0000  causal 2.2500  bits per byte 1.0000 1.5000"
    )


def test_a_train_line_shows_what_matters():
    line = train_line(record(), 1000, 7500)
    assert line == (
        " 120/1000  loss 3.1416  prior 0.012  grad 0.99  routed 38%  45.7k tok/s  1.23 TFLOP/s  left 2h05m"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"iteration": 49990, "model_tflops": 312.4, "lm_loss": 11.4321, "grad_norm": 12.345},
        {"iteration": 476000, "tokens_per_second": 1_234_567.0, "model_tflops": 412.0, "grad_norm": 123.4},
        {"routing": {}, "aux_losses": {}},
    ],
    ids=["small", "usual", "large", "dense"],
)
def test_a_train_line_fits_100_columns(changes):
    line = train_line(
        record(**changes), 476837 if changes.get("iteration", 0) > 50000 else 50000, 12.3 * 86400
    )
    assert len(line) <= 100, f"{len(line)} columns: {line}"


def test_a_dense_run_has_no_routed_fraction_in_its_line():
    assert "routed" not in train_line(record(routing={}, aux_losses={}), 1000, 1)


def test_scores_on_tasks_are_one_line_without_their_errors():
    scores = {"piqa": {"acc": 0.51234, "acc_stderr": 0.01}, "text": {"word_perplexity": 3.9354e20}}
    assert tasks_line(20, 400, scores) == " 20/400  tasks  piqa acc 0.5123  text word_perplexity 3.94e+20"
