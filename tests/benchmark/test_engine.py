"""The benchmark of real runs: what it reads from their metrics, and what it says of a run that fails."""

import json

import pytest

from megadyn.benchmark import engine
from megadyn.benchmark.engine import as_table, config_for, figure_of, parse_args, planned_gib, read_records
from megadyn.config import load_config, save_config
from megadyn.errors import RunError, UserError

SMALL = [
    *("--hidden=32", "--layers=4", "--heads=4", "--kv-heads=2", "--ffn=64", "--vocab=300", "--sequence=24"),
    *("--batch=2", "--micro-batches=3", "--steps=4", "--rounds=2", "--precision=bf16", "--device=cpu"),
]


def record(milliseconds, gib=None):
    memory = {"resident_peak": 1.0} if gib is None else {"allocated_peak": gib, "reserved_peak": 9.0}
    mfu = {"mfu_causal_half": None if gib is None else 0.4, "mfu_whole_square": None if gib is None else 0.5}
    return {"step_time_ms": milliseconds, "memory_gib": memory} | mfu


def test_a_figure_is_the_median_of_what_the_run_reported(tmp_path):
    config = config_for("mod:0.25", parse_args(SMALL), tmp_path / "run")
    log = ["[12:00] attention: flash (auto)", "[12:00] kernels: triton (auto)", "other"]
    found = figure_of("mod:0.25", config, [record(50, 3.0), record(20, 3.0), record(10, 4.0)], log)
    assert (found.seconds, found.tokens_per_second) == (0.02, 2 * 3 * 24 / 0.02)
    assert (found.mfu_half, found.mfu_full, found.measured_gib) == (0.4, 0.5, 4.0)
    assert found.choices == ["attention: flash (auto)", "kernels: triton (auto)"]
    found.planned_gib = 3.2
    assert as_table([found]).splitlines()[2] == (
        "| mod:0.25 | 20.0 | 7,200 (1.00x) | 40.0% / 50.0% | 3.20 | 4.00 | 1.25 |"
    )


def test_a_cpu_has_neither_memory_nor_mfu_to_tell(tmp_path):
    config = config_for("dense", parse_args(SMALL), tmp_path / "run")
    found = figure_of("dense", config, [record(10)], [])
    assert as_table([found]).splitlines()[2].endswith("(1.00x) |  | 0.00 |  |  |")


def test_the_configuration_is_that_of_a_run_with_the_planned_memory(tmp_path):
    config = config_for("dense", parse_args([*SMALL, "--recompute=full"]), tmp_path / "run")
    save_config(config, tmp_path / "given.yaml")
    read = load_config(tmp_path / "given.yaml")
    assert read.training.recompute == "full"
    assert (read.training.global_batch_size, read.training.micro_batch_size) == (6, 2)
    assert read.logging.interval == 4
    assert planned_gib(read) == planned_gib(config) > 0


def test_only_whole_lines_of_steps_are_records(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == []
    file.write_text(
        json.dumps({"iteration": 0, "validation": {}}) + "\n" + json.dumps(record(10)) + '\n{"step'
    )
    assert read_records(file) == [record(10)]


def test_a_run_that_fails_is_told_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.sys, "executable", "/bin/false")
    config = config_for("dense", parse_args(SMALL), tmp_path / "run")
    with pytest.raises(RunError, match="the run of run ended early: it said nothing"):
        engine.records_of(config, 1, "cpu")


def test_a_vocabulary_too_small_is_refused_before_anything_starts(tmp_path):
    args = parse_args([*SMALL, "--vocab=97", f"--folder={tmp_path}"])
    with pytest.raises(UserError, match="--vocab 97: must be at least 257"):
        engine.measure(args, "cpu")
    assert not list(tmp_path.iterdir())
