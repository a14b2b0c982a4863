"""The benchmark of processes: layouts take turns, agree in their losses, and tell what went wrong."""

import math

import pytest

from megadyn.benchmark import scaling
from megadyn.benchmark.scaling import Layout, check_losses, figures_of, measure, parse_args
from megadyn.errors import RunError, UserError
from tests.helpers.tiny import ROOT

SMALL = [
    f"--{name}={value}"
    for name, value in (
        ("hidden", 32),
        ("layers", 2),
        ("heads", 4),
        ("kv-heads", 2),
        ("ffn", 64),
        ("vocab", 61),
        ("sequence", 24),
        ("global-batch", 4),
        ("rounds", 2),
        ("warmup", 1),
        ("device", "cpu"),
        ("deepspeed-config", ROOT / "ds_configs/zero1.json"),
    )
]


def test_layouts_do_the_same_steps_in_turns(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    args = parse_args([*SMALL, "--layouts", "1x1x1", "2x1x1", "1x2x1", "1x1x2"])
    figures = measure(args, args.layouts)
    assert [figure.processes for figure in figures] == [1, 2, 2, 2]
    for figure in figures:
        assert 0 < figure.fastest <= figure.seconds
        assert figure.tokens_per_second == pytest.approx(4 * 24 / figure.seconds)
        assert figure.speedup == pytest.approx(figures[0].seconds / figure.seconds)
        assert figure.loss == pytest.approx(figures[0].loss, rel=1e-4)
    assert scaling.as_table(figures).splitlines()[3].startswith("| 2x1x1 | 2 | ")


def test_what_the_cores_allow(monkeypatch):
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 2)
    args = parse_args(SMALL)
    layouts = [Layout(1, 1, 1), Layout(2, 1, 1), Layout(1, 1, 4)]
    figures = figures_of(layouts, [[4.0, 5.0, 4.5], [2.5], [3.0]], [1.0] * 3, args)
    assert [figure.possible for figure in figures] == [1, 1, 0.5]
    assert [figure.speedup for figure in figures] == [1, 1.8, 1.5]
    assert [figure.efficiency for figure in figures] == [1, 0.9, 0.375]


@pytest.mark.parametrize("loss", [1.001, math.nan])
def test_a_layout_that_computes_something_else_is_an_error(loss):
    with pytest.raises(RunError, match=f"layout 1x2x1: the loss is {loss}, but 1.0 under 1x1x1"):
        check_losses([Layout(1, 1, 1), Layout(1, 2, 1)], [1.0, loss], "fp32")


def die(line, *rest):
    raise SystemExit(3)


def fail(line, *rest):
    line.send("ValueError: no such thing")


@pytest.mark.parametrize(
    ("ends", "message"),
    [(die, "layout 1x1x1: rank 0 died"), (fail, "layout 1x1x1: rank 0 failed: ValueError: no such thing")],
)
def test_a_rank_that_does_not_answer_is_named(monkeypatch, ends, message):
    monkeypatch.setattr(scaling, "_be_rank", ends)
    args = parse_args([*SMALL, "--layouts", "1x1x1"])
    with pytest.raises(RunError, match=message):
        measure(args, args.layouts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "2x1"], "must be TENSORxPIPELINExDATA"),
        (["--layouts", "3x1x1"], "parallel.tensor = 3"),
        (["--layouts", "1x1x3"], "training.global_batch_size = 4"),
        (["--model", "moe"], "'moe': must be one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(scaling.launch, "check_device", lambda device: None)
    with pytest.raises(UserError, match=message):
        scaling.main([*SMALL, *arguments])
