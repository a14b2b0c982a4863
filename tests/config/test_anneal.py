"""An annealed capacity: the levels that a run or a phase is divided into, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megadyn.config import Config, load_config, phase_configs, save_config
from megadyn.errors import UserError
from megadyn.kinds import find_kind, known_kinds

ANNEAL = {"capacity": 1.0, "iterations": 6, "levels": 3}


def load(
    folder: Path, *, routing: Any = None, phases: Any = (), anneal: Any = None, **training: Any
) -> Config:
    length = {} if phases else {"iterations": 10}
    content = {
        "model": {"num_layers": 4, "num_heads": 4, "routing": routing or {"kind": "mod", "capacity": 0.25}},
        "data": {"train": "corpus"},
        "tokenizer": {"path": "byte"},
        "training": {"global_batch_size": 4, "sequence_length": 48} | length | training,
        "optimizer": {"warmup_iterations": 3, "schedule": "linear"},
        "output_dir": "out",
        "phases": list(phases),
    }
    if anneal:
        content["training"]["anneal"] = anneal
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return load_config(folder / "run.yaml")


def levels(config: Config) -> list[tuple[str, float, int]]:
    parts = phase_configs(config)
    return [(one.phase.name, one.model.routing.share, one.phase.end) for one in parts]


def test_a_run_moves_in_levels_to_its_own_capacity(tmp_path):
    config = load(tmp_path, anneal=ANNEAL)
    assert levels(config) == [("run.1", 1.0, 2), ("run.2", 0.75, 4), ("run.3", 0.5, 6), ("run", 0.25, 10)]
    assert config.training.iterations == 10 and config.model.routing.share == 0.25
    parts = phase_configs(config)
    assert all(one.optimizer.span(one.training.iterations) == 10 for one in parts)  # one schedule over all
    assert [one.phase.changes for one in parts[2:]] == [
        {"model.routing.capacity": 0.5},
        {"model.routing.capacity": 0.25},
    ]


def test_it_may_rise_in_steps_that_do_not_divide_evenly_at_any_length(tmp_path):
    anneal = {"capacity": 0.125, "iterations": 5, "levels": 2}
    config = load(tmp_path, anneal=anneal, iterations=None, tokens=9 * 4 * 48 - 1)
    assert levels(config) == [("run.1", 0.125, 2), ("run.2", 0.1875, 5), ("run", 0.25, 9)]


def test_a_phase_is_divided_and_keeps_its_schedule(tmp_path):
    phases = [
        {"name": "hold", "iterations": 4},
        {
            "name": "fall",
            "iterations": 6,
            "training": {"anneal": {"capacity": 0.5, "iterations": 4, "levels": 2}},
            "optimizer": {"schedule": "linear", "learning_rate": 1e-3},
        },
        {"name": "end", "iterations": 2},
    ]
    config = load(tmp_path, phases=phases)
    assert levels(config) == [
        ("hold", 0.25, 4),
        ("fall.1", 0.5, 6),
        ("fall.2", 0.375, 8),
        ("fall", 0.25, 10),
        ("end", 0.25, 12),
    ]
    spans = [(one.optimizer.schedule_begin, one.optimizer.schedule_end) for one in phase_configs(config)]
    assert spans == [(0, 12), (4, 10), (4, 10), (4, 10), (0, 12)]


@pytest.mark.parametrize("phased", [False, True])
def test_a_saved_configuration_means_the_same_run(phased, tmp_path):
    phases = [{"name": "all", "iterations": 10, "training": {"anneal": ANNEAL}}] if phased else []
    config = load(tmp_path, phases=phases, anneal=None if phased else ANNEAL)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config and phase_configs(again) == phase_configs(config)
    level = phase_configs(config)[1]  # a plain run, as its checkpoints say
    save_config(level, tmp_path / "level.yaml")
    assert load_config(tmp_path / "level.yaml") == level and not level.is_in_parts


def test_every_kind_with_a_capacity_has_it_and_others_refuse(tmp_path):
    have, anneal = [], ANNEAL | {"levels": 1}
    for kind in known_kinds():
        routing: dict[str, Any] = {"kind": kind}
        if not find_kind(kind)(kind).has_capacity:
            with pytest.raises(UserError, match=r"^training\.anneal\.capacity = 1\.0: must be null with "):
                load(tmp_path, routing=routing, anneal=anneal)
            continue
        shares = [share for _, share, _ in levels(load(tmp_path, routing=routing, anneal=anneal))]
        assert shares[0] == 1.0 and shares == sorted(set(shares), reverse=True)
        have.append(kind)
    assert len(have) >= 7


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"anneal": ANNEAL | {"capacity": 0.25}}, "capacity = 0.25: must be different from model"),
        ({"anneal": ANNEAL | {"capacity": 1.5}}, r"capacity = 1.5: must be in \(0, 1\]"),
        ({"anneal": {"capacity": 1.0}}, "iterations = None: must be given with"),
        ({"anneal": {"iterations": 4}}, "iterations = 4: must be left out without training.anneal.capacity"),
        ({"anneal": {"levels": 4}}, "levels = 4: must be left out without training.anneal.capacity"),
        ({"anneal": ANNEAL | {"levels": 7}}, "levels = 7: must be at most training.anneal.iterations = 6"),
        ({"anneal": ANNEAL | {"levels": 0}}, "levels = 0: must be at least 1"),
        ({"anneal": ANNEAL | {"iterations": 10}}, "iterations = 10: must be less than the 10 steps"),
        ({"anneal": ANNEAL, "iterations": None, "epochs": 2}, "epochs = 2.0: must be null with training.anneal"),
        ({"anneal": ANNEAL, "iterations": None, "flops": 1e9}, "flops = .*: must be null with training.anneal"),
        ({"anneal": ANNEAL, "phases": [{"name": "a", "iterations": 9}]}, "capacity = 1.0: must be null with phases"),
        (
            {"phases": [{"name": "a", "iterations": 9, "training": {"anneal": {"capacity": 1.0}}}]},
            "^phase 'a': training.anneal.iterations = None",
        ),
        (
            {
                "phases": [
                    {"name": "a", "iterations": 9, "training": {"anneal": ANNEAL}},
                    {"name": "a.2", "iterations": 9},
                ]
            },
            "^phases = 'a.2': must be another name",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(change, error, tmp_path):
    with pytest.raises(UserError, match=error):
        load(tmp_path, **change)
