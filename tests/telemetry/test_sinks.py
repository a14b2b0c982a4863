"""Where records go: each sink holds what was written, and drops what a run that goes back will do again."""

import json
import sys

import pytest

from megadyn.config import LoggingConfig
from megadyn.errors import ConfigError
from megadyn.log import log
from megadyn.telemetry.sinks import (
    CsvRows,
    JsonLines,
    TensorBoard,
    WeightsAndBiases,
    flat_scalars,
    open_sinks,
    refuse_wandb,
    refuse_wandb_login,
)
from tests.helpers.sabotage import no_room_beyond
from tests.helpers.tiny import tiny_config


def record(iteration: int) -> dict:
    return {
        "iteration": iteration,
        "lm_loss": iteration / 3,
        "mfu_causal_half": None,
        "routing": {"1": {"threshold": 0.5}},
    }


def test_flat_scalars_are_named_by_their_path_without_the_iteration():
    nested = {
        "iteration": 7,
        "lm_loss": 1.5,
        "routing": {"0": {"D_st": 2.0}, "1": {"threshold": 0.5}},
        "aux_losses": {},
        "mfu_causal_half": None,
    }
    assert flat_scalars(nested) == [("lm_loss", 1.5), ("routing/0/D_st", 2.0), ("routing/1/threshold", 0.5)]


def test_lines_of_steps_that_will_be_done_again_are_dropped(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i, "lm_loss": i / 3}) for i in (1, 2, 3, 4)]
    lines.insert(3, json.dumps({"iteration": 3, "validation": {"topk": 1.0}}))
    path.write_text("\n".join(lines) + "\n")
    JsonLines(path, 3).close()
    assert path.read_text() == "\n".join(lines[:4]) + "\n"
    assert not caplog.records


# what a lost disk leaves
@pytest.mark.parametrize(
    ("kind", "name", "whole", "cut"),
    [
        (JsonLines, "metrics.jsonl", '{"iteration": 1}\n', '{"iteration": 2, "lm_lo'),
        (JsonLines, "metrics.jsonl", '{"iteration": 1}\n', "\n"),
        (JsonLines, "metrics.jsonl", '{"iteration": 1}\n', "[2]\n"),
        # a number that was longer
        (CsvRows, "metrics.csv", "iteration,name,value\n1,lm_loss,2.5\n", "2,lm_loss,2."),
        (CsvRows, "metrics.csv", "iteration,name,value\n1,lm_loss,2.5\n", "2,lm\n"),
        (CsvRows, "metrics.csv", "iteration,name,value\n", "\0" * 200_000 + "\n"),
    ],
)
def test_a_half_written_line_is_dropped_with_a_warning(tmp_path, caplog, monkeypatch, kind, name, whole, cut):
    monkeypatch.setattr(log, "propagate", True)
    path = tmp_path / name
    path.write_text(whole + cut)
    kind(path, 10).close()
    assert path.read_text() == whole
    assert "incomplete line" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_csv_rows_are_a_table_of_what_has_a_number(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("of an earlier run, which this one replaces\n")
    rows = CsvRows(path, 0)
    for iteration in (1, 2, 3):
        rows.write(record(iteration))
    rows.go_back(1)
    rows.write(record(2) | {"lm_loss": float("nan")})
    rows.close()
    resumed = CsvRows(path, 2)
    resumed.write({"iteration": 3, "validation": {"topk": 1.5}})
    resumed.close()
    assert path.read_text().splitlines() == [
        "iteration,name,value",
        f"1,lm_loss,{1 / 3}",
        "1,routing/1/threshold,0.5",
        "2,lm_loss,nan",
        "2,routing/1/threshold,0.5",
        "3,validation/topk,1.5",
    ]


def test_each_sink_is_there_when_it_is_asked_for(tmp_path):
    config = tiny_config()
    config.logging.csv = True
    sinks = open_sinks(config, tmp_path, 0)
    assert [type(sink) for sink in sinks] == [JsonLines, CsvRows, TensorBoard]
    for sink in sinks:
        sink.write(record(1))
        sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.csv", "tensorboard"}


def test_tensorboard_shows_what_was_written_and_hides_what_is_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown() -> list[tuple[int, float]]:
        return [
            (event.step, event.value) for event in EventAccumulator(str(tmp_path)).Reload().Scalars("lm_loss")
        ]

    board = TensorBoard(tmp_path, 0)
    for iteration in (3, 6, 9):
        board.write(record(iteration))
    assert shown() == [(3, 1.0), (6, 2.0), (9, 3.0)]
    board.go_back(3)
    board.write(record(6) | {"lm_loss": 2.5})
    board.close()
    assert shown() == [(3, 1.0), (6, 2.5)]
    resumed = TensorBoard(tmp_path, 3)
    resumed.write(record(6))
    assert shown() == [(3, 1.0), (6, 2.0)]


@pytest.mark.parametrize("kind", [JsonLines, CsvRows, TensorBoard])
def test_a_record_is_written_whole_or_not_at_all(tmp_path, kind):
    sink = kind(tmp_path / "metrics", 0)
    sink.write(record(1))
    path = sink.path
    before = path.read_bytes()
    with no_room_beyond(len(before) + 9), pytest.raises(OSError, match="File too large"):
        sink.write(record(2))
    assert path.read_bytes() == before
    sink.write(record(2))
    assert len(path.read_bytes()) > len(before) + 9


def test_weights_and_biases_offline_holds_the_records(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_config()
    config.logging.wandb, config.logging.tensorboard = "offline", False
    refuse_wandb(config.logging)
    refuse_wandb_login(config.logging)  # offline needs no account
    folder = tmp_path / "a run"
    folder.mkdir()
    sink = WeightsAndBiases(config, folder, 0)
    sink.write(record(1) | {"lm_loss": 1.23456789})
    sink.close()
    (log_file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = log_file.read_bytes()
    for said in (
        b"lm_loss",
        b"1.23456789",
        b"routing/1/threshold",
        b"a run",
        (folder / "wandb-id").read_bytes().strip(),
    ):
        assert said in content


def test_a_run_that_begins_anew_is_another_of_weights_and_biases(tmp_path):
    first = WeightsAndBiases._id(tmp_path, True)
    assert WeightsAndBiases._id(tmp_path, False) == first
    assert WeightsAndBiases._id(tmp_path, True) != first


def test_weights_and_biases_without_a_login_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match=r"logging.wandb = 'online': must be offline or none, or first run `wandb login`.*"
    ):
        refuse_wandb_login(LoggingConfig(wandb="online"))
    refuse_wandb_login(LoggingConfig())


def test_weights_and_biases_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        refuse_wandb(LoggingConfig(wandb="offline"))
    refuse_wandb(LoggingConfig())
