"""The samples of each phase: none twice while there are new ones, and a function of the configuration alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megadyn.config import Config, load_config, phase_configs
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.samples import Samples
from megadyn.errors import ConfigError
from megadyn.training.data import Data, open_data
from megadyn.training.length import Position
from megadyn.training.phases import open_part
from megadyn.training.streams import Streams

LENGTH = 24


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """make(phases) -> the phases' configurations and data. In `a`, `b` and `c`, of 200, 100 and 50 samples, no token occurs
    twice."""
    first = 0
    for name, samples in (("a", 200), ("b", 100), ("c", 50)):
        tokens = np.arange(first, first + samples * LENGTH + 1)
        first += len(tokens)
        with IndexedWriter(tmp_path / name, "<u2") as writer:
            writer.add(tokens, [len(tokens)], [1])
            writer.finish()

    def make(phases: list[dict[str, Any]], **data: Any) -> list[tuple[Config, Data]]:
        content = {
            "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": first},
            "data": {"train": mix(a=1, b=1), "split": [1, 0, 0], "cache": str(tmp_path / "cache")} | data,
            "tokenizer": {"path": "byte"},
            "training": {"global_batch_size": 4, "sequence_length": LENGTH},
            "output_dir": "out",
            "phases": phases,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        configs, streams = phase_configs(load_config(tmp_path / "run.yaml")), Streams()
        return [(one, open_part(one, None, streams)) for one in configs]

    def mix(**weights: float) -> list[dict[str, Any]]:
        return [{"prefix": str(tmp_path / name), "weight": weight} for name, weight in weights.items()]

    make.mix = mix
    return make


def used(config: Config, samples: Samples) -> list[int]:
    """The first token of each sample that the phase takes, in order."""
    assert config.phase is not None
    return samples.take(range(config.phase.samples, config.phase.samples_at_end))[:, 0].tolist()


def test_no_sample_is_used_twice_while_there_are_new_ones(make):
    """Three mixes of the same datasets, also listed in another order, and the first mix again."""
    phases = make(
        [
            {"name": "one", "iterations": 10},
            {"name": "two", "iterations": 5, "data": {"train": make.mix(b=1, c=1, a=2)}},
            {
                "name": "rates",
                "iterations": 5,
                "data": {"train": make.mix(b=1, c=1, a=2)},
                "optimizer": {"weight_decay": 0},
            },
            {"name": "again", "iterations": 10},
            {"name": "alone", "iterations": 2, "data": {"train": make.mix(a=1)[0]["prefix"]}},
        ]
    )
    taken = [used(config, data.train) for config, data in phases]
    every = [token for tokens in taken for token in tokens]
    assert [len(tokens) for tokens in taken] == [40, 20, 20, 40, 8]
    assert len(set(every)) == len(every)
    begins_b, begins_c = 200 * LENGTH + 1, 300 * LENGTH + 2
    assert sum(begins_b <= token < begins_c for token in taken[1]) == 5
    assert sum(token >= begins_c for token in taken[1] + taken[2]) == 10
    origins = [config.data.origin for config, _ in phases]
    assert origins == [0, 40, 40, 80, 120]  # the third goes on in the stream of the second
    assert [entry.get("skip", 0) for entry in phases[3][0].data.train] == [40, 30]
    assert [entry.get("order") for entry in phases[1][0].data.train] == [1, 2, 0]
    assert phases[4][0].data.train == {"prefix": phases[0][0].data.train[0]["prefix"], "skip": 60}


def test_the_first_phase_has_the_samples_of_a_run_without_phases(make):
    (one, data), _ = make([{"name": "one", "iterations": 10}, {"name": "two", "iterations": 1}])
    one.phase, alone = None, one.data.train
    assert open_data(one, Position()).train.key == data.train.key
    assert all(set(entry) == {"prefix", "weight"} for entry in alone)


def test_another_sequence_length_is_another_cut(make):
    _, (long, data) = make(
        [
            {"name": "one", "iterations": 10},
            {"name": "long", "iterations": 2, "training": {"sequence_length": 48}},
        ]
    )
    assert long.data.origin == 40 and not any("skip" in entry for entry in long.data.train)
    assert len(set(used(long, data.train))) == 8


def test_proportions_by_size_do_not_depend_on_what_was_used(make):
    plain = [entry["prefix"] for entry in make.mix(a=1, b=1)]
    phases = make(
        [
            {"name": "one", "iterations": 3, "data": {"train": plain}},
            {"name": "two", "iterations": 3, "data": {"train": plain[0]}},
            {"name": "three", "iterations": 6, "data": {"train": plain}},
        ]
    )
    taken = [used(config, data.train) for config, data in phases]
    every = [token for tokens in taken for token in tokens]
    assert len(set(every)) == len(every)
    assert [sum(token >= 200 * LENGTH for token in tokens) for tokens in taken] == [4, 0, 8]
    assert phases[2][0].data.train == [
        {"prefix": plain[0], "skip": 20},
        {"prefix": plain[1], "skip": 4},
    ]


def test_a_phase_that_would_repeat_samples_is_refused_if_it_may_not(make):
    """Of the 100 samples of b, 40 and 60 are used; one step more is too much."""
    only = {"train": make.mix(b=1)}
    fits = [{"name": "one", "iterations": 20}, {"name": "two", "iterations": 15, "data": only}]
    assert len(make(fits, repeat=False)) == 2
    with pytest.raises(
        ConfigError, match=r"data\.repeat = False: .* at most 35: dataset .*b has no new sample left"
    ):
        make([fits[0], fits[1] | {"iterations": 16}], repeat=False)


def test_data_cannot_begin_behind_the_run(make):
    _, (two, _) = make(
        [
            {"name": "one", "iterations": 10},
            {"name": "two", "iterations": 1, "data": {"train": make.mix(c=1)}},
        ]
    )
    open_data(two, Position(10, 44))  # a rollback has used 4 more
    with pytest.raises(
        ConfigError, match=r"data\.origin = 40: must be at most 36, what the run has consumed"
    ):
        open_data(two, Position(9, 36))
