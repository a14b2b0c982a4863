"""The benchmark of layers: which parts it finds, what they add up to, and what it refuses."""

import json

import pytest
import torch

from megadyn.benchmark import layer
from megadyn.benchmark.models import build
from megadyn.benchmark.parts import choice_of, parts_of
from megadyn.errors import UserError

SMALL = [
    f"--{name}={value}"
    for name, value in (
        ("hidden", 64),
        ("heads", 4),
        ("kv-heads", 2),
        ("ffn", 128),
        ("vocab", 97),
        ("sequence", 80),
        ("batch", 2),
        ("rounds", 2),
        ("warmup", 1),
    )
]
PARTS = {
    "dense": ["norm", "attention", "add + norm", "MLP"],
    "head": ["loss"],
    "mod": ["router", "choose", "take", "norm", "attention", "add + norm", "MLP", "put_back"],
    "dtf_decision": ["prior and surprise", "norm", "attention", "add + norm", "MLP"],
    "dtf_dynamic": ["choose", "take", "norm", "attention", "add + norm", "MLP", "put_back"],
    "dtrnet": ["router", "choose", "norm", "attention or bypass", "add + norm", "MLP"],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_part_is_timed_counted_and_checked(precision, capsys):
    layer.main([*SMALL, f"--precision={precision}", "--json"])
    *_, table, last = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(last)
    assert table.startswith("| ") and "| layer |" in table
    for kind, parts in PARTS.items():
        mine = [figure for figure in figures if figure["layer"] == kind]
        assert [figure["part"] for figure in mine] == (parts if kind == "head" else [*parts, "rest", "layer"])
        *inner, whole = mine
        assert whole["share"] == pytest.approx(1)
        assert sum(figure["share"] for figure in inner) == pytest.approx(float(kind != "head"))
        for figure in mine:
            name = f"{kind}, {figure['part']}"
            assert figure["part"] == "rest" or figure["forward"] > 0, name
            assert figure["counted"] is None or figure["counted"] == pytest.approx(1, abs=0.02), name
            unchecked = ("rest", "choose") if precision == "fp32" else ("rest", "choose", "layer")
            assert (figure["float64_error"] is None) == (figure["part"] in unchecked), name
            assert bool(figure["bytes"]) == (figure["part"] in ("norm", "add + norm", "take", "put_back")), (
                name
            )
    assert all(
        figure["backward"] == pytest.approx(0, abs=2e-2) for figure in figures if figure["part"] == "choose"
    )


def test_the_parts_of_a_skipping_layer_make_its_output():
    """MoD's: what is put back is the block of what was taken, times the gate."""
    torch.manual_seed(0)
    args = layer.parse_args(SMALL)
    args.recompute = "none"
    tokens = torch.randint(97, (2, 80))
    model = build("mod:0.3", args, torch.device("cpu"), torch.float32, tokens, [])
    stream, mod = layer.reached_by(model.module, tokens)[1], model.module.layers[2]
    parts = {
        part.name: part.run for part in parts_of(mod, "mod", stream, model.config, choice_of(mod, stream))
    }
    with torch.no_grad():
        _, rows = parts["take"](stream.hidden)
        update = parts["attention"](parts["norm"](rows))
        _, normed = parts["add + norm"](rows, update)
        gate = parts["router"](stream.hidden).sigmoid()
        put = parts["put_back"](stream.hidden, gate, update + parts["MLP"](normed))
        torch.testing.assert_close(put, parts["layer"](stream.hidden))


def test_a_part_that_computes_something_else_is_an_error(monkeypatch):
    monkeypatch.setattr(layer, "FP32_TOLERANCE", 1e-12)
    with pytest.raises(UserError, match="dense, norm: relative difference of .* from float64"):
        layer.main([*SMALL, "--models", "dense"])


@pytest.mark.parametrize("name", ["moe", "qwen2"])
def test_what_has_no_layers_of_ours_is_refused(name):
    with pytest.raises(UserError, match=f"--models {name}: must be KIND"):
        layer.main([*SMALL, "--models", name])
