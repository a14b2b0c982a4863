"""A disk without room costs a run no step and, if there is room again in time, no record."""

import json
from pathlib import Path

import pytest

from megadyn.log import log
from megadyn.telemetry import patience
from megadyn.telemetry.patience import PatientSink
from megadyn.telemetry.sinks import CsvRows, JsonLines
from tests.helpers.sabotage import no_room_beyond


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", log.name)
    return caplog


def record(iteration: int, loss: float = 2.5) -> dict[str, float]:
    return {"iteration": iteration, "lm_loss": loss}


def written(path: Path) -> list[tuple[int, float]]:
    return [(line["iteration"], line["lm_loss"]) for line in map(json.loads, path.read_text().splitlines())]


def test_what_waits_is_written_in_order_when_there_is_room_again(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    sink = PatientSink(JsonLines(tmp_path / "metrics.jsonl", 0))
    sink.write(record(1))
    with no_room_beyond(50):
        for iteration in (2, 3):
            sink.write(record(iteration))
        assert written(sink.sink.path) == [(1, 2.5)]
    sink.write(record(4))
    sink.close()
    assert written(sink.sink.path) == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 2.5)]
    assert said.messages == [
        "metrics.jsonl cannot be written: [Errno 27] File too large; the run continues, and records wait in memory",
        "metrics.jsonl can be written again",
    ]


@pytest.mark.parametrize("kind", [JsonLines, CsvRows])
def test_a_rollback_without_room_is_done_later(
    kind: type, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    broken, sound = (PatientSink(kind(tmp_path / name, 0)) for name in ("broken", "sound"))
    for sink in (broken, sound):
        for iteration in (1, 2, 3, 4):
            sink.write(record(iteration))
    with no_room_beyond(10):
        broken.write(record(5))
        broken.go_back(3)  # the file still has 4, and 5 waits
        broken.write(record(4, 1.5))
        broken.go_back(2)
        broken.write(record(3, 1.5))
    broken.write(record(4, 1.25))
    sound.go_back(2)
    sound.write(record(3, 1.5))
    sound.write(record(4, 1.25))
    assert broken.sink.path.read_text() == sound.sink.path.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "sound"}  # nothing half-written is left


def test_the_end_says_how_many_records_are_lost(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "WAITING", 3)
    sink = PatientSink(JsonLines(tmp_path / "metrics.jsonl", 0))
    sink.sink.path.mkdir()  # what no append goes into
    for iteration in range(5):
        sink.write(record(iteration))
    sink.close()
    assert said.messages[1:] == ["metrics.jsonl: 5 records could not be written and are lost"]
    assert said.messages[0].startswith("metrics.jsonl cannot be written: [Errno 21] Is a directory")
