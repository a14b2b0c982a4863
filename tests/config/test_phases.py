"""Phases: what each comes to, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megadyn.checkpoint.same_run import MUST_EQUAL, check_phases
from megadyn.config import Config, load_config, phase_configs, save_config
from megadyn.config.phase_specs import changeable
from megadyn.config.phases import steps_of
from megadyn.errors import UserError
from megadyn.telemetry.router_health import settled_at

SHARES = [
    {"name": "hold", "share": 0.5},
    {"name": "decay", "share": 0.3, "optimizer": {"schedule": "linear"}},
    {"name": "long", "share": 0.2, "training": {"sequence_length": 96, "global_batch_size": 2}},
]


def load(
    folder: Path, phases: list[Any], *overrides: str, optimizer: dict[str, Any] | None = None, **training: Any
) -> Config:
    content = {
        "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "routing": {"kind": "mod"}},
        "data": {"train": "corpus"},
        "tokenizer": {"path": "byte"},
        "training": {"global_batch_size": 4, "sequence_length": 48} | training,
        "optimizer": optimizer or {"warmup_iterations": 5, "schedule": "constant"},
        "output_dir": "out",
        "phases": phases,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return load_config(folder / "run.yaml", overrides)


def lengths(phases: list[dict[str, Any]], unit: str, *amounts: Any) -> list[dict[str, Any]]:
    """`phases` with these lengths."""
    return [
        {key: value for key, value in phase.items() if key != "share"} | {unit: amount}
        for phase, amount in zip(phases, amounts, strict=True)
    ]


@pytest.mark.parametrize(
    ("phases", "training", "ends"),
    [
        (SHARES, {"iterations": 20}, [10, 16, 20]),
        (SHARES, {"iterations": 7}, [4, 6, 7]),  # no step is lost or doubled
        (SHARES, {"samples": 80}, [10, 16, 24]),
        (SHARES, {"tokens": "1920"}, [5, 8, 10]),
        (lengths(SHARES, "iterations", 3, 4, 2), {}, [3, 7, 9]),
        (lengths(SHARES, "samples", 12, 13, 4), {}, [3, 7, 9]),  # rounded up to whole steps
        (lengths(SHARES, "tokens", "0.6K", 768, 200), {}, [4, 8, 10]),
    ],
)
def test_lengths_become_iterations(phases, training, ends, tmp_path):
    config = load(tmp_path, phases, **training)
    assert [phase.training.iterations for phase in phase_configs(config)] == ends
    assert config.training.iterations == ends[-1]
    assert [phase.phase.total for phase in phase_configs(config)] == [ends[-1]] * 3


@pytest.mark.parametrize(
    "phases", [SHARES, lengths(SHARES, "tokens", 500, 768, 200)], ids=["share", "tokens"]
)
def test_a_saved_configuration_means_the_same_run(phases, tmp_path):
    config = load(tmp_path, phases, **({"samples": 80} if phases is SHARES else {}))
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config and phase_configs(again) == phase_configs(config)
    assert [one.phase for one in phase_configs(again)] == [one.phase for one in phase_configs(config)]
    # and so does that of each phase, which has no phases of its own
    for one in phase_configs(config):
        save_config(one, tmp_path / "phase.yaml")
        assert load_config(tmp_path / "phase.yaml") == one


def test_a_phase_changes_what_it_names_and_nothing_else(tmp_path):
    hold, decay, long = phase_configs(load(tmp_path, SHARES, iterations=20))
    assert (hold.optimizer.schedule, hold.optimizer.warmup_iterations) == ("constant", 5)
    assert (hold.optimizer.schedule_begin, hold.optimizer.schedule_end) == (0, 20)
    # a schedule of its own, from begin to end of the phase, without a warm-up
    assert (decay.optimizer.schedule, decay.optimizer.warmup_iterations) == ("linear", 0)
    assert (decay.optimizer.schedule_begin, decay.optimizer.schedule_end) == (10, 16)
    assert (long.optimizer, long.training.sequence_length) == (hold.optimizer, 96)
    assert hold.model == decay.model == long.model and hold.model.max_position == 96
    assert [one.phase.samples for one in (hold, decay, long)] == [0, 40, 64]
    warm = [*SHARES[:2], SHARES[2] | {"optimizer": {"warmup_iterations": 2}}]
    own = phase_configs(load(tmp_path, warm, iterations=20))[2].optimizer
    assert (own.warmup_iterations, own.schedule_begin, own.schedule_end) == (2, 16, 20)


def test_data_are_replaced_and_not_merged(tmp_path):
    mix = {"data": {"train": {"prefix": "b"}}}
    config = load(
        tmp_path, [SHARES[0], SHARES[1] | mix, SHARES[2]], "data.train={prefix: a, weight: 1}", iterations=9
    )
    assert [one.data.train for one in phase_configs(config)] == [
        {"prefix": "a", "weight": 1},
        {"prefix": "b"},
        {"prefix": "a", "weight": 1},
    ]


def test_what_phases_may_change_a_resumed_run_may_change_too(tmp_path):
    config = load(tmp_path, SHARES, iterations=20)
    new_data = {"training.sequence_length"}  # begins new data, whose order is another one anyway
    assert set(changeable(config)) & set(MUST_EQUAL) == new_data
    assert "model.routing.capacity" in changeable(config)
    assert not {"model.routing.kind", "model.routing.layout", "model.routing.gate"} & set(changeable(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"training": {"seed": 1}},
            "phases[2].training.seed = 1: must be left out: a phase cannot change it",
        ),
        ({"model": {"hidden_size": 8}}, "phases[2].model.hidden_size = 8: must be left out"),
        (
            {"model": {"routing": {"layout": "TDTD"}}},
            "phases[2].model.routing.layout = 'TDTD': must be left out",
        ),
        ({"parallel": {"tensor": 2}}, "phases[2].parallel = {'tensor': 2}: must be left out"),
        ({"precision": "fp32"}, "phases[2].precision = 'fp32': must be left out"),
        (
            {"training": {"sequense_length": 8}},
            "a phase cannot change it (did you mean 'training.sequence_length'?)",
        ),
        ({"training": {"sequence_length": "much"}}, "phases[2].training.sequence_length: Value 'much'"),
        (
            {"training": {"global_batch_size": 0}},
            "phases[2].training.global_batch_size = 0: must be at least 1",
        ),
        (
            {"training": {"global_batch_size": 3, "micro_batch_size": 2}},
            "phase 'long': training.global_batch_size = 3: must be a multiple of training.micro_batch_size = 2",
        ),
        (
            {"optimizer": {"learning_rate": 1e-9}},
            "phase 'long': optimizer.min_learning_rate = 3e-05: must be at most optimizer.learning_rate = 1e-09",
        ),
        ({"name": "hold"}, "phases[2].name = 'hold': must be different from those of the other phases"),
        ({"name": "a/b"}, "phases[2].name = 'a/b': must be a name of letters"),
        ({"share": 0.1}, "phases = [0.5, 0.3, 0.1]: must be shares that sum to 1"),
        ({"share": 0}, "phases[2].share = 0: must be a share of the run, above 0 and at most 1"),
        ({"iterations": 5}, "phases[2] = ['iterations', 'share']: must be a phase with one length"),
        (
            {"data": {"train": [{"prefix": "a", "skip": 3}]}},
            "data.train = 'a': must be without skip and order",
        ),
    ],
)
def test_a_phase_that_cannot_be_is_refused_by_name(change, said, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, [*SHARES[:2], SHARES[2] | change], iterations=20)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("phases", "training", "overrides", "said"),
    [
        (
            SHARES,
            {},
            [],
            "training.iterations = None: must be given, or tokens or samples, with phases by share",
        ),
        (SHARES, {"epochs": 1.0}, [], "training.epochs = 1.0: must be null with phases"),
        (SHARES, {"iterations": 2}, [], "phases[2].share = 0.2: must be more: the phase has no step"),
        (
            lengths(SHARES, "iterations", 3, 4, 2),
            {"iterations": 9},
            [],
            "training.iterations = 9: must be null with phases whose lengths are given as iterations",
        ),
        (
            [SHARES[0], {"name": "x", "tokens": 5}],
            {"iterations": 9},
            [],
            "phases[1].tokens = 5: must be given as share",
        ),
        (["x"], {"iterations": 9}, [], "phases[0] = 'x': must be keys: name"),
        (SHARES, {"iterations": 9}, ["data.origin=4"], "data.origin = 4: must be 0 with phases"),
        (
            SHARES,
            {"iterations": 9},
            ["optimizer.schedule_tokens=4"],
            "optimizer.schedule_tokens = 4: must be null",
        ),
        (
            SHARES,
            {"iterations": 9},
            ["training.routing_record=x"],
            "training.routing_record = 'x': must be null",
        ),
    ],
)
def test_a_run_that_its_phases_do_not_fit_is_refused(phases, training, overrides, said, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, phases, *overrides, **training)
    assert said in str(caught.value)


def test_steps_are_traced_in_the_phases_that_have_them(tmp_path):
    config = load(
        tmp_path, SHARES, "logging.profile_steps=[9,11]", "logging.memory_snapshot_steps=[2,4]", iterations=20
    )
    steps = [one.logging.profile_steps for one in phase_configs(config)]
    assert steps == [[9, 11], [9, 11], None]  # steps 1 to 10, 11 to 16, 17 to 20
    assert [one.logging.memory_snapshot_steps for one in phase_configs(config)] == [[2, 4], None, None]


def test_reports_on_routers_count_from_the_begin_of_a_phase(tmp_path):
    """From there thresholds may average anew; the warm-up of the run is over."""
    phases = phase_configs(load(tmp_path, SHARES, iterations=20))
    settling = phases[0].model.routing.settling_steps
    assert settling > 0
    assert [settled_at(one) for one in phases] == [settling, 10 + settling, 16 + settling]


def test_a_finished_run_may_get_phases_behind_it(tmp_path):
    """Of the same steps; its checkpoint, of a run without phases, knows nothing of them."""
    anneal = phase_configs(load(tmp_path, SHARES, iterations=20))[1]
    manifest = {"iteration": 10, "consumed_samples": 40}
    check_phases(anneal, manifest, Path("there"))
    with pytest.raises(
        UserError, match="has consumed 20 samples, but these phases consume 40 up to its iteration 10"
    ):
        check_phases(anneal, manifest | {"consumed_samples": 20}, Path("there"))
    later = manifest | {"phases": [["hold", 8, 4, 48], ["decay", 16, 4, 48]]}
    with pytest.raises(
        UserError, match=r"phase 'hold' cannot change once it has begun: .* iteration 8, .* up to 10"
    ):
        check_phases(anneal, later, Path("there"))


RAMP = [
    {"name": "small", "samples": 10, "training": {"global_batch_size": 2}},
    {"name": "middle", "samples": 12, "training": {"global_batch_size": 4}},
    {"name": "large", "samples": 32, "training": {"global_batch_size": 8}},
]
"""Steps of 2, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8 samples."""


@pytest.mark.parametrize(
    ("samples", "warmup"), [(1, 1), (4, 2), (10, 5), (11, 6), (18, 7), (22, 8), (25, 9), (54, 12), (55, 13)]
)
@pytest.mark.parametrize("decay", [1, 16, 17, 32, 33, 37, 44, 45, 54])
def test_a_schedule_in_tokens_counts_the_batches_of_a_ramp(samples, warmup, decay):
    batches = [2] * 5 + [4] * 3 + [8] * 4
    steps, sizes = [5, 3, 4], [2, 4, 8]
    assert steps_of(samples, steps, sizes, 0) == warmup
    last = next(k for k in range(1, 13) if sum(batches[-k:]) >= decay)  # one step after another
    assert steps_of(decay, steps[::-1], sizes[::-1], 0) == last
    inside = next(k for k in range(1, 10) if sum(batches[3 : 3 + k]) >= min(samples, 40))
    assert steps_of(min(samples, 40), steps, sizes, 3) == inside


def test_lengths_in_tokens_become_steps_of_all_phases(tmp_path):
    optimizer = {"schedule": "wsd", "warmup_tokens": 18 * 48, "decay_tokens": "1.6K"}  # 33.3 samples
    own = {"schedule": "wsd", "warmup_tokens": "0.2K", "decay_iterations": 1}
    phases = [*RAMP[:2], RAMP[2] | {"optimizer": own}]
    config = load(tmp_path, phases, optimizer=optimizer)
    found = [one.optimizer for one in phase_configs(config)]
    assert [(one.warmup_iterations, one.decay_iterations) for one in found] == [(7, 5), (7, 5), (1, 1)]
    assert [(one.warmup_tokens, one.decay_tokens) for one in found] == [(None, None)] * 3
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_phase_replaces_a_length_in_the_other_unit(tmp_path):
    decay = {"schedule": "wsd", "decay_tokens": 400, "warmup_iterations": 1}
    optimizer = {"warmup_tokens": 400, "decay_iterations": 2}
    config = load(tmp_path, [*RAMP[:2], RAMP[2] | {"optimizer": decay}], optimizer=optimizer)
    found = phase_configs(config)[2].optimizer
    assert (found.warmup_iterations, found.decay_iterations) == (1, 2)
    assert (config.optimizer.warmup_tokens, config.optimizer.decay_iterations) == (400, 2)


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ({"warmup_tokens": 5, "warmup_iterations": 5}, "^phase 'large': optimizer.warmup_tokens = 5: must be null"),
        ({"decay_tokens": 5, "decay_iterations": 5}, "^phase 'large': optimizer.decay_tokens = 5: must be null"),
        ({"warmup_tokens": 0}, "^phase 'large': optimizer.warmup_tokens = 0: must be at least 1"),
        ({"warmup_tokens": "many"}, r"^phases\[2\].optimizer.warmup_tokens = 'many': must be a whole number"),
    ],
)  # fmt: skip
def test_lengths_that_contradict_each_other_are_refused(own, error, tmp_path):
    with pytest.raises(UserError, match=error):
        load(tmp_path, [*RAMP[:2], RAMP[2] | {"optimizer": own}])
