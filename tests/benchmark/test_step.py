"""The benchmark of a training step: what it builds, counts and refuses."""

import argparse
import json

import pytest
import torch
from torch.testing import assert_close

from megadyn.benchmark import step
from megadyn.benchmark.models import build
from megadyn.errors import UserError
from megadyn.model import compiled
from megadyn.network import routed_layers

SMALL = [
    f"--{name}={value}"
    for name, value in (
        ("hidden", 64),
        ("layers", 2),
        ("heads", 4),
        ("kv-heads", 2),
        ("ffn", 128),
        ("vocab", 97),
        ("sequence", 200),
        ("batch", 2),
        ("rounds", 2),
        ("warmup", 1),
    )
]
CPU = torch.device("cpu")


def built(name, *others):
    args = step.parse_args(SMALL)
    tokens = torch.randint(97, (2, 201), generator=torch.Generator().manual_seed(0))
    return (
        build(name, args, CPU, torch.float32, tokens[:, :-1], others),
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
    )


def test_every_model_is_timed_counted_and_checked(capsys):
    step.main([*SMALL, "--json"])
    *_, table, last = capsys.readouterr().out.strip().splitlines()
    found = {figure["name"]: figure for figure in json.loads(last)}
    assert list(found) == [
        "dense",
        "dtf:0.5",
        "mod:0.125",
        "dtrnet:0.1",
        "fixed",
        "nested",
        "subskip",
        "skip_middle",
        "stt",
        "qwen2",
    ]
    for name, figure in found.items():
        # two halves round apart
        assert figure["counted"] == pytest.approx(1, abs=0.02 if name == "subskip" else 0.01), name
        assert 0 < figure["fastest"] <= figure["seconds"]
        assert figure["tokens_per_second"] == pytest.approx(400 / figure["seconds"])
        assert 0 < figure["mfu_half"] < figure["mfu_full"]
    assert found["dense"]["time_share"] == found["dense"]["flops_share"] == found["qwen2"]["flops_share"] == 1
    assert (
        found["mod:0.125"]["flops_share"]
        < found["dtf:0.5"]["flops_share"]
        < found["dtrnet:0.1"]["flops_share"]
        < 1
    )
    mod = found["mod:0.125"]
    assert mod["saved"] == pytest.approx((1 - mod["time_share"]) / (1 - mod["flops_share"]))
    assert found["qwen2"]["saved"] is None
    assert table.startswith("| qwen2 |")


def test_compiled_models_are_counted_and_checked_too(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    compiled._compiled.cache_clear()
    step.main([*SMALL, "--json", "--compile", "--models", "dense", "dtf:0.5"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [figure["counted"] for figure in found] == pytest.approx([1, 1], abs=0.01)
    compiled._compiled.cache_clear()


def test_qwen2_is_the_dense_model():
    dense, tokens, labels = built("dense")
    qwen2, *_ = built("qwen2", dense)
    assert_close(qwen2.loss(tokens, labels), dense.loss(tokens, labels))


@pytest.mark.parametrize("share", ["0.1", "0.4"])
def test_as_many_tokens_attend_as_asked(share):
    model, tokens, labels = built(f"dtrnet:{share}")
    layers = routed_layers(model.module)
    for layer in layers:
        layer.monitor.read()  # of the passes that set the routers
    model.loss(tokens, labels).backward()
    for layer in layers:
        assert layer.monitor.read()["routed_fraction"].item() == pytest.approx(float(share), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "moe"], "--models moe: must be KIND"),
        (["--models", "mod:x"], "'x' is not a number"),
        (["--models", "mod:0.5", "qwen2"], "copies the weights of the dense model"),
        (["--models", "mod:2"], "model.routing.capacity"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        step.main([*SMALL, *arguments])


def test_a_model_that_computes_something_else_is_an_error(monkeypatch):
    monkeypatch.setattr(step, "float64_error", lambda *_: 2e-4)
    with pytest.raises(
        UserError, match="dense: loss or gradients have a relative difference of 2.0e-04 from float64"
    ):
        step.measure(argparse.Namespace(**vars(step.parse_args(SMALL))), CPU)
