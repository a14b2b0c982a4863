"""What a run reports about itself."""

import json
import math
from pathlib import Path

import pytest

from megadyn.log import log
from megadyn.planning.flops import training_flops
from megadyn.training.telemetry import (
    Telemetry,
    auxiliary_losses,
    duration,
    flat_scalars,
    keep_lines_until,
    train_line,
)
from tests.tiny import tiny_config

ROUTING = {
    3: {"routed_fraction": 0.5, "threshold": 0.7},
    0: {"prior_loss": 0.1, "D_st": 2.0}, 2: {"prior_loss": 0.3, "D_st": 4.0},
    1: {"routed_fraction": 0.25, "threshold": 0.6},
}


@pytest.mark.parametrize(("seconds", "shown"), [
    (0, "0s"), (9, "9s"), (59.4, "59s"), (59.5, "1m00s"), (247, "4m07s"), (3599, "59m59s"), (3599.6, "1h00m"), (7500, "2h05m"),
    (86399, "23h59m"), (86400, "1d00h"), (3 * 86400 + 4 * 3600 + 59, "3d04h"), (math.inf, "?"), (math.nan, "?")])
def test_a_duration_shows_its_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


def record(**changes) -> dict:
    return {"iteration": 120, "lm_loss": 3.14159, "aux_losses": {"prior": 0.01234}, "grad_norm": 0.987, "routing": ROUTING,
            "tokens_per_second": 45678.9, "model_tflops": 1.2345} | changes


def test_a_train_line_shows_what_matters():
    line = train_line(record(), 1000, 7500)
    assert line == (" 120/1000  loss 3.1416  prior 0.012  grad 0.99  routed 38%  45.7k tok/s  1.23 TFLOP/s  left 2h05m")


@pytest.mark.parametrize("changes", [
    {}, {"iteration": 49990, "model_tflops": 312.4, "lm_loss": 11.4321, "grad_norm": 12.345},
    {"iteration": 476000, "tokens_per_second": 1_234_567.0, "model_tflops": 412.0, "grad_norm": 123.4},
    {"routing": {}, "aux_losses": {}},
], ids=["small", "usual", "large", "dense"])
def test_a_train_line_fits_100_columns(changes):
    line = train_line(record(**changes), 476837 if changes.get("iteration", 0) > 50000 else 50000, 12.3 * 86400)
    assert len(line) <= 100, f"{len(line)} columns: {line}"


def test_a_dense_run_has_no_routed_fraction_in_its_line():
    assert "routed" not in train_line(record(routing={}, aux_losses={}), 1000, 1)


def test_auxiliary_losses_are_means_over_the_layers_that_have_them():
    assert auxiliary_losses(ROUTING) == pytest.approx({"prior": 0.2})
    assert auxiliary_losses(ROUTING | {4: {"prior_loss": 0.5, "z_loss": 7.0}}) == pytest.approx({"prior": 0.3, "z": 7.0})
    assert auxiliary_losses({}) == {}


def test_flat_scalars_are_named_by_their_path_without_the_iteration():
    nested = {"iteration": 7, "lm_loss": 1.5, "routing": {"0": {"D_st": 2.0}, "1": {"threshold": 0.5}}, "aux_losses": {}}
    assert flat_scalars(nested) == [("lm_loss", 1.5), ("routing/0/D_st", 2.0), ("routing/1/threshold", 0.5)]


def test_lines_of_steps_that_will_be_done_again_are_dropped(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i, "lm_loss": i / 3}) for i in (1, 2, 3, 4)]
    lines.insert(3, json.dumps({"iteration": 3, "validation": {"topk": 1.0}}))
    path.write_text("\n".join(lines) + "\n")
    keep_lines_until(path, 3)
    assert path.read_text() == "\n".join(lines[:4]) + "\n"
    assert not caplog.records


def test_a_half_written_last_line_is_dropped_with_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2, "lm_lo')
    keep_lines_until(path, 10)
    assert path.read_text() == '{"iteration": 1}\n'
    assert "half-written" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_metrics_yet_has_nothing_to_drop(tmp_path):
    keep_lines_until(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def report(telemetry: Telemetry, iteration: int) -> None:
    telemetry.train(iteration, consumed_samples=4 * iteration, lm_loss=2.5, grad_norm=1.0, learning_rate=1e-3, routing=ROUTING)


def test_a_resumed_run_continues_the_metrics_of_its_first_part(tmp_path, monkeypatch):
    """10 seconds pass between two looks at the clock."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("megadyn.training.telemetry.time.perf_counter", lambda: float(next(clock)))
    config = tiny_config(iterations=20)
    config.logging.tensorboard = False
    first = Telemetry(config, 2, tmp_path, 0)
    for _ in range(5):
        first.add_wait(0.125)
    report(first, 5)
    first.add_wait(7)                       # of a step before the clock begins anew
    first.evaluation(5, "validation", {"topk": 2.0, "causal": 2.25})
    report(first, 10)
    first.close()
    second = Telemetry(config, 2, tmp_path, 5)
    report(second, 10)
    second.close()

    records = [json.loads(line) for line in Path(tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [5, 5, 10]
    train, validation, last = records
    assert validation == {"iteration": 5, "validation": {"topk": 2.0, "causal": 2.25}}
    assert train["consumed_tokens"] == 20 * 24
    assert train["step_time_ms"] == pytest.approx(2000)               # 10 s for 5 steps
    assert (train["data_time_ms"], last["data_time_ms"]) == (125, 0)
    assert train["tokens_per_second"] == pytest.approx(4 * 24 / 2)
    flops = training_flops(config.model, 24) * 4 / 2                  # of a step, on each of two ranks
    assert train["model_tflops"] == pytest.approx(flops / 2 / 1e12)
    assert list(train["routing"]) == ["0", "1", "2", "3"]
    assert last["step_time_ms"] == pytest.approx(2000)                # the steps before the resumption are not counted
