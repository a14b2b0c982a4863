"""What a run reports about itself."""

import io
import json
import sys
from inspect import signature
from pathlib import Path

import pytest

from megadyn.log import log
from megadyn.planning.flops import training_flops
from megadyn.telemetry.patience import PatientSink
from megadyn.telemetry.sinks import WeightsAndBiases
from megadyn.telemetry.telemetry import Silent, Telemetry, auxiliary_losses
from tests.helpers.tiny import tiny_config

ROUTING = {
    3: {"routed_fraction": 0.5, "threshold": 0.7},
    0: {"prior_loss": 0.1, "D_st": 2.0},
    2: {"prior_loss": 0.3, "D_st": 4.0},
    1: {"routed_fraction": 0.25, "threshold": 0.6},
}


def test_auxiliary_losses_are_means_over_the_layers_that_have_them():
    assert auxiliary_losses(ROUTING) == pytest.approx({"prior": 0.2})
    assert auxiliary_losses(ROUTING | {4: {"prior_loss": 0.5, "z_loss": 7.0}}) == pytest.approx(
        {"prior": 0.3, "z": 7.0}
    )
    assert auxiliary_losses({}) == {}


def report(telemetry: Telemetry, iteration: int) -> None:
    telemetry.train(
        iteration,
        consumed_samples=4 * iteration,
        consumed_tokens=96 * iteration,
        lm_loss=2.5,
        grad_norm=1.0,
        learning_rate=1e-3,
        routing=ROUTING,
    )


def test_a_resumed_run_continues_the_metrics_of_its_first_part(tmp_path, monkeypatch):
    """10 seconds pass between two looks at the clock."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("megadyn.telemetry.telemetry.time.perf_counter", lambda: float(next(clock)))
    config = tiny_config(iterations=20)
    config.logging.tensorboard = False
    first = Telemetry(config, 2, tmp_path, 0)
    for step in range(1, 6):
        first.step(step, 0.125)
    report(first, 5)
    first.step(6, 7)  # of a step before the clock begins anew
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
    assert train["step_time_ms"] == pytest.approx(2000)  # 10 s for 5 steps
    assert (train["data_time_ms"], last["data_time_ms"]) == (125, 0)
    assert train["tokens_per_second"] == pytest.approx(4 * 24 / 2)
    flops = training_flops(config.model, 24) * 4 / 2  # of a step, on each of two ranks
    assert train["model_tflops"] == pytest.approx(flops / 2 / 1e12)
    assert list(train["routing"]) == ["0", "1", "2", "3"]
    assert last["step_time_ms"] == pytest.approx(2000)  # the steps before the resumption are not counted


def dead_service() -> PatientSink:
    service = WeightsAndBiases.__new__(WeightsAndBiases)
    service.run = None
    return PatientSink(service)


def test_a_service_that_died_stops_neither_the_run_nor_the_other_sinks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    config = tiny_config(iterations=20)
    config.logging.tensorboard = False
    telemetry = Telemetry(config, 1, tmp_path, 0)
    telemetry.sinks.insert(0, dead_service())
    report(telemetry, 5)
    report(telemetry, 10)
    assert [
        json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [5, 10]
    telemetry.close()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 3
    assert said[0].startswith("Weights & Biases cannot be written: ")
    assert said[1].startswith("Weights & Biases: the last metrics may be missing: ")
    assert said[2] == "Weights & Biases: 2 records could not be written and are lost"


@pytest.mark.parametrize("kind", [OSError, BrokenPipeError])
def test_a_terminal_that_is_gone_stops_no_run(tmp_path, monkeypatch, caplog, kind):
    class Output(io.StringIO):
        is_gone = False

        def write(self, text: str) -> int:
            if self.is_gone:
                raise kind("gone")
            return super().write(text)

    output = Output()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", log.name)
    config = tiny_config(iterations=20)
    config.logging.tensorboard, config.logging.live = False, "always"
    telemetry = Telemetry(config, 1, tmp_path, 0)
    report(telemetry, 5)
    assert "5 of 20" in output.getvalue() and not caplog.records
    output.is_gone = True
    report(telemetry, 10)
    telemetry.step(11, 0.0)
    telemetry.close()
    assert "the live view ends: gone" in caplog.text and "10/20  loss 2.5000" in caplog.text
    assert sys.stdout is output
    assert [
        json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [5, 10]


def test_a_rollback_takes_every_sink_back(tmp_path):
    config = tiny_config(iterations=20)
    config.logging.tensorboard, config.logging.csv = False, True
    telemetry = Telemetry(config, 1, tmp_path, 0)
    for iteration in (5, 10):
        report(telemetry, iteration)
    telemetry.go_back(5, telemetry.iterations)
    telemetry.event(5, "bad_step", {"iteration": 12})
    telemetry.close()
    assert [
        json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [5, 5]
    assert {row.split(",")[0] for row in (tmp_path / "metrics.csv").read_text().splitlines()} == {
        "iteration",
        "5",
    }


def test_other_ranks_can_be_told_all_that_rank_0_is():
    told = {name for name in vars(Telemetry) if not name.startswith("_")}
    assert told == {name for name in vars(Silent) if not name.startswith("_")}
    for name in told:
        assert signature(getattr(Telemetry, name)) == signature(getattr(Silent, name)), name
