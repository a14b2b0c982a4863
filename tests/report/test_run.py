"""What a run's folder holds, and what is broken in it."""

import json
from pathlib import Path

import numpy as np
import pytest

from megadyn.errors import UserError
from megadyn.report.run import differences, number, read_checkpoints, read_run, read_runs, short_names
from tests.report.conftest import records, write_metrics


def test_curves_are_the_records(make_run):
    run = read_run(make_run(), "a")
    assert run.iterations.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.values("lm_loss")[-1] == pytest.approx(4.9)
    assert np.isnan(run.values("grad_norm")).tolist() == [False, True, False, False, False, False]
    assert run.evaluated("validation", "causal")[1].tolist() == [5.6, 5.0]
    assert run.evaluated("test", "causal")[0].size == 0
    layers, values = run.by_layer("causal_agreement")
    assert layers == [1, 3] and values.shape == (2, 6) and values[1, 0] == pytest.approx(0.83)
    assert run.auxiliary() == ["prior"]
    assert run.tokens_at(np.array([0.0, 1.5])).tolist() == [0, 144]
    assert (run.last_iteration, run.notes) == (6, [])
    assert run.config["model.routing.kind"] == "dtf"


@pytest.mark.parametrize(
    "cut",
    [
        '{"iteration": 7, "lm_lo',
        '{"iteration": 7}}',
        "\0\0\0\0",
        '{"lm_loss": 1}',
        "[1]",
        '{"iteration": 7, "lm_loss": 3, "routing": {"1": 2}}',
        '{"iteration": 7, "aux_losses": 3}',
    ],
)
def test_a_half_written_last_line_is_left_out_and_named(make_run, cut):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(cut)
    run = read_run(folder, "a")
    assert (len(run.training), run.last_iteration) == (6, 6)
    (note,) = run.notes
    assert "incomplete" in note


def test_broken_lines_before_the_end_are_counted(make_run):
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], "x", *lines[3:], "y", "z"]))
    run = read_run(folder, "a")
    assert len(run.training) == 6
    assert [
        ("last line" in note, "2 line(s)" in note and "the first of them 4" in note) for note in run.notes
    ] == [(True, False), (False, True)]


def test_of_a_repeated_iteration_the_later_record_counts(make_run):
    folder = make_run()
    again = records()[3] | {"lm_loss": 99.0}
    write_metrics(folder, [*records(), {"iteration": 5, "bad_step": {"problem": "loss is nan"}}, again])
    run = read_run(folder, "a")
    assert run.iterations.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.values("lm_loss")[2] == 99
    assert run.events == [{"iteration": 5, "bad_step": {"problem": "loss is nan"}}]


@pytest.mark.parametrize("value", [None, "1.0", True, float("inf"), float("nan"), [1], {}])
def test_what_is_no_number_is_a_gap(value):
    assert np.isnan(number({"a": {"b": value}}, "a", "b"))
    assert np.isnan(number({"a": value}, "a", "b"))


def test_an_unfinished_run_says_so(make_run):
    folder = make_run()
    write_metrics(folder, records()[:4])
    (note,) = read_run(folder, "a").notes
    assert "iteration 3 of 6" in note


def test_what_is_no_run_is_refused(tmp_path: Path, make_run):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    blank, broken = make_run("dense", "blank"), make_run("dense", "broken")
    (blank / "metrics.jsonl").write_text("")
    (broken / "metrics.jsonl").write_text('{"iter')
    for folder, said in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "empty", "holds no metrics.jsonl"),
        (blank, "it holds no complete record yet"),
        (broken, "only broken lines"),
    ):
        with pytest.raises(UserError, match=said):
            read_runs([folder])


def test_a_missing_or_malformed_configuration_is_a_note(make_run):
    folder = make_run()
    (folder / "config.yaml").write_text("model: [1, 2\n")
    assert any("not valid YAML" in note for note in read_run(folder, "a").notes)
    (folder / "config.yaml").unlink()
    run = read_run(folder, "a")
    assert any("cannot be read" in note for note in run.notes)
    assert run.config == {}


def test_differences_are_by_key():
    first = {"a.b": 1, "a.c": [1, 2], "only": None}
    assert differences(first, {"a.b": 1.5, "a.c": [1, 2], "new": "x"}) == [
        ("a.b", "1", "1.5"),
        ("only", "null", "-"),
        ("new", "-", '"x"'),
    ]
    assert differences(first, dict(first)) == []


def test_names_tell_runs_apart():
    assert short_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert short_names([Path("/r/mod/seed1"), Path("/r/dtf/seed1")]) == ["mod/seed1", "dtf/seed1"]
    assert short_names([Path("/r/a"), Path("/r/a")]) == ["a (1)", "a (2)"]


def test_checkpoints_are_whole_or_damaged(make_run):
    folder = make_run()
    (whole,) = read_checkpoints(folder)
    assert (whole.iteration, whole.problem, whole.is_used, whole.topology["tensor"]) == (6, None, True, 1)
    assert whole.bytes == sum(path.stat().st_size for path in whole.folder.iterdir())
    weights = next(whole.folder.glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    later = folder / "checkpoints" / "iteration-00000009"
    later.mkdir()
    (folder / "checkpoints" / ".removing-iteration-00000003").mkdir()
    beyond, damaged = read_checkpoints(folder)
    assert "sha256" in damaged.problem
    assert (beyond.iteration, beyond.is_used) == (9, False)
    assert "not a checkpoint" in beyond.problem


def test_a_manifest_that_is_no_json_is_damage(make_run):
    folder = make_run()
    path = folder / "checkpoints" / "iteration-00000006" / "manifest.json"
    path.write_text(json.dumps({"format": 1})[:-2])
    assert "not valid JSON" in read_checkpoints(folder)[0].problem
