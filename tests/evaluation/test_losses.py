"""The figures of `megadyn evaluate`, also of a model that diverged."""

import json
import math

import pytest

from megadyn.commands import evaluate as tool
from megadyn.evaluation.losses import perplexity


def test_perplexity_is_no_number_where_the_loss_is_none():
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_the_object_of_a_model_that_diverged_is_json(monkeypatch, capsys):
    result = {
        "topk": math.nan,
        "causal": 1e4,
        "tokens": 24,
        "bits_per_byte": None,
        "perplexity": {"topk": math.nan, "causal": math.inf},
    }
    monkeypatch.setattr("megadyn.evaluation.losses.evaluate", lambda *args, **options: result)
    assert tool.main(["--checkpoint", "run", "--data", "set", "--json"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line) == {
        "topk": None,
        "causal": 1e4,
        "tokens": 24,
        "bits_per_byte": None,
        "perplexity": {"topk": None, "causal": None},
    }
