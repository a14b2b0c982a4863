"""Length of a run whose batch size changes between its starts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megadyn.config import Config, DataConfig, TokenizerConfig, resolved_config
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.engine.optimizer import learning_rate, schedule_problem
from megadyn.errors import ConfigError
from megadyn.planning.flops import training_flops
from megadyn.training.data import open_data
from megadyn.training.length import Course, Position, schedule_of, schedule_steps
from tests.helpers.tiny import tiny_config

LENGTH = 24


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """A dense run on one dataset of 208 samples, with these keys of the training section."""
    with IndexedWriter(tmp_path / "a", "<u2") as writer:
        writer.add(np.full(5000, ord("a")), [50] * 100, [1] * 100)
        writer.finish()

    def make(repeat: bool = True, **training: object) -> Config:
        config = tiny_config("dense", vocab_size=300)
        config.data = DataConfig(train=str(tmp_path / "a"), split=[1, 0, 0], repeat=repeat)
        config.tokenizer = TokenizerConfig(path="byte")
        for key, value in ({"iterations": None, "micro_batch_size": 1} | training).items():
            setattr(config.training, key, value)
        return config.checked()

    return make


@pytest.mark.parametrize(
    ("length", "start", "batch", "iterations"),
    [
        ({"tokens": 192 * LENGTH}, Position(12, 96), 16, 18),  # 96 of 192 samples are left, 16 a step
        ({"samples": 192}, Position(12, 96), 16, 18),
        ({"samples": 192}, Position(12, 96), 20, 17),  # rounded up: 4.8 steps
        ({"epochs": 1}, Position(12, 96), 16, 19),  # 112 of 208 are left
        ({"epochs": 1}, Position(12, 96), 20, 17),  # rounded down: 5.6 steps
        ({"iterations": 24}, Position(12, 96), 16, 24),
        ({"samples": 192}, Position(24, 192), 8, 24),  # complete
        ({"samples": 192}, Position(10, 96), 8, 22),  # a rollback has undone two steps
    ],
)
def test_what_was_consumed_counts_whatever_the_batch_was(make, length, start, batch, iterations):
    config = make(**length, global_batch_size=batch)
    open_data(config, start)
    assert config.training.iterations == iterations
    assert (
        config.training.samples_at_end(*start) == 96 + (iterations - start.iteration) * batch
        or start.iteration == 24
    )


def test_operations_are_those_of_the_plan(make):
    config = make(flops=3e9, global_batch_size=16)
    open_data(config, Position(12, 96))
    per_sample = training_flops(config.model, LENGTH)
    assert config.training.iterations == 12 + (int(3e9 // per_sample) - 96) // 16
    assert resolved_config(config)["training"]["flops"] == 3e9
    with pytest.raises(ConfigError, match=r"training\.flops = 1000\.0: must be more: a sample takes"):
        open_data(make(flops=1e3), Position())


def test_an_uninterrupted_run_is_as_long_as_it_was(make):
    for samples in range(1, 40):
        config = make(samples=samples, global_batch_size=8)
        fresh = config.training.iterations
        for iteration in range(fresh + 1):
            open_data(config, Position(iteration, 8 * iteration))
            assert config.training.iterations == fresh


def test_repeats_are_counted_from_what_was_consumed(make):
    """208 samples: 96 in steps of 8, then 7 steps of 16 fit, 8 do not."""
    open_data(make(repeat=False, iterations=19, global_batch_size=16), Position(12, 96))
    with pytest.raises(ConfigError, match=r"training\.iterations at most 19: .* after 208 of the run's 224$"):
        open_data(make(repeat=False, iterations=20, global_batch_size=16), Position(12, 96))
    # 26 steps of 8 are the whole dataset; a run that stands at 12 with fewer samples behind it may take more steps.
    open_data(make(repeat=False, iterations=30, global_batch_size=4), Position(12, 96))


def test_the_learning_rate_goes_on_where_the_batch_changes(make):
    """From the change on, a step of 16 moves as far along the cosine as two of 8."""
    plain = make(samples=192, global_batch_size=8)
    plain.optimizer.warmup_iterations = 4
    straight = [learning_rate(plain.optimizer, i, 24) for i in range(24)]
    changed = make(samples=192, global_batch_size=16)
    changed.optimizer.warmup_iterations = 4
    course = Course(8)
    open_data(changed, Position(12, 96))
    course.go_on(Position(12, 96), 16)
    course = Course.from_manifest(
        {"iteration": 12, "consumed_samples": 96, "course": json.loads(json.dumps(course.state()))}
    )
    rates = []
    for i in range(12, 18):
        place = schedule_of(changed, course, Position(i, 96 + 16 * (i - 12)))
        rates.append(learning_rate(changed.optimizer, i, 18, place))
    assert rates == pytest.approx(straight[13::2])
    assert rates[-1] == pytest.approx(changed.optimizer.min_learning_rate)


def in_tokens(config: Config, step: int) -> None:
    """A warm-up of 6 steps and a decay of 8, of so many tokens each; both lengths are rounded up."""
    config.optimizer.warmup_iterations = None
    config.optimizer.warmup_tokens, config.optimizer.decay_tokens = 6 * step - 1, 8 * step - step // 2


@pytest.mark.parametrize("length", [{"iterations": 24}, {"samples": 192}])
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_lengths_in_tokens_are_those_in_steps(make, name, length):
    plain, config = (make(**length, global_batch_size=8) for _ in range(2))
    plain.optimizer.schedule = config.optimizer.schedule = name
    plain.optimizer.warmup_iterations, plain.optimizer.decay_iterations = 6, 8
    in_tokens(config, 8 * LENGTH)
    for i in range(24):
        place = schedule_of(config.checked(), Course(8), Position(i, 8 * i))
        assert learning_rate(config.optimizer, i, 24, place) == learning_rate(plain.optimizer, i, 24)


@pytest.mark.parametrize("at", [4, 12, 20], ids=["in the warm-up", "between", "in the decay"])
def test_lengths_in_tokens_go_on_where_the_batch_changes(make, at):
    """From step `at` on, a step of 16 moves as far as two of 8: in a run of 24 steps of 8, whose length is in iterations."""
    plain = make(iterations=24, global_batch_size=8)
    plain.optimizer.schedule = "wsd"
    plain.optimizer.warmup_iterations, plain.optimizer.decay_iterations = 6, 8
    straight = [learning_rate(plain.optimizer, i, 24) for i in range(24)]
    end = at + (24 - at) // 2
    changed = make(iterations=end, global_batch_size=16)
    changed.optimizer.schedule = "wsd"
    in_tokens(changed, 8 * LENGTH)
    rates = [
        learning_rate(
            changed.optimizer, i, end, schedule_of(changed, Course(8), Position(i, 8 * at + 16 * (i - at)))
        )
        for i in range(at, end)
    ]
    assert rates == pytest.approx(straight[at + 1 :: 2])


@pytest.mark.parametrize("length", [{"iterations": 10}, {"samples": 80}])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_run_that_will_be_extended_follows_the_longer_schedule(make, name, length):
    config = make(**length, global_batch_size=8)
    config.optimizer.schedule, config.optimizer.warmup_iterations = name, 3
    config.optimizer.schedule_tokens = 24 * 8 * LENGTH - 1  # rounded up
    course = Course(8)
    for i in range(10):
        place = schedule_of(config, course, Position(i, 8 * i))
        assert learning_rate(config.optimizer, i, 10, place) == learning_rate(config.optimizer, i, 24)
    last = schedule_of(config, course, Position(30, 8 * 30))
    assert learning_rate(config.optimizer, 30, 40, last) == config.optimizer.min_learning_rate


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_learning_rate_of_an_unchanged_run_is_the_same_to_the_bit(make, name):
    config = make(samples=80, global_batch_size=8)
    config.optimizer.schedule, config.optimizer.warmup_iterations = name, 3
    course = Course(8)
    for i in range(10):
        place = schedule_of(config, course, Position(i, 8 * i))
        assert place is not None
        assert learning_rate(config.optimizer, i, 10, place) == learning_rate(config.optimizer, i, 10)


def test_the_course_knows_changes_and_rollbacks():
    course = Course(8)
    course.go_on(Position(12, 96), 8)
    assert course.state() == [[0, 0, 8]]
    course.go_on(Position(12, 96), 16)
    assert [course.consumed_at(i) for i in (0, 11, 12, 14)] == [0, 88, 96, 128]
    course.go_on(Position(10, 128), 16)  # back from 14; the change has been undone
    assert [course.consumed_at(i) for i in (9, 10, 11)] == [72, 128, 144]
    old = Course.from_manifest({"iteration": 10, "consumed_samples": 80})
    assert old.consumed_at(5) == 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"warmup_iterations": 21},
            "optimizer.warmup_iterations = 21 is longer than the run of 20 iterations: the learning rate "
            "only rises, to 0.000952 instead of 0.001, and never decays",
        ),
        (
            {"warmup_iterations": 20},
            "is the whole run: the learning rate reaches 0.001 in the last step and never decays",
        ),
        ({"warmup_iterations": 20, "schedule": "constant"}, None),
        (
            {"warmup_iterations": None, "warmup_tokens": 83},
            "optimizer.warmup_tokens = 83 (21 steps) is longer than the run of 20 iterations",
        ),
        (
            {"schedule": "wsd", "decay_tokens": 61},
            "optimizer.decay_tokens = 61 (16 steps) does not fit after a warm-up of 5 into 20 iterations",
        ),
        (
            {"schedule": "wsd", "decay_iterations": 16},
            "optimizer.decay_iterations = 16 does not fit after a warm-up of 5 into 20 "
            "iterations: the decay takes 15",
        ),
        ({"schedule": "wsd", "decay_iterations": 15}, None),
        ({"schedule": "wsd"}, None),
        ({"schedule": "wsd", "warmup_iterations": 19}, "optimizer.decay_iterations = 2 does not fit"),
        ({}, None),
    ],
)
def test_a_schedule_that_does_not_fit_is_told(changes, said):
    optimizer = tiny_config().optimizer
    optimizer.warmup_iterations = 5
    for key, value in changes.items():
        setattr(optimizer, key, value)
    problem = schedule_problem(optimizer, 20, tokens_per_step=4)
    assert (problem is None) if said is None else (problem is not None and said in problem)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("length", [{"iterations": 60}, {"samples": 480}])
def test_a_schedule_from_begin_to_end_is_that_of_a_run_of_its_own(make, name, length):
    own = tiny_config().optimizer
    own.schedule, own.warmup_iterations = name, 3
    alone = [learning_rate(own, i, 24) for i in range(24)]
    config = make(**length, global_batch_size=8)
    config.optimizer.schedule, config.optimizer.warmup_iterations = name, 3
    config.optimizer.schedule_begin, config.optimizer.schedule_end = 10, 34
    course = Course(8)
    rates = [
        learning_rate(config.optimizer, i, 60, schedule_of(config, course, Position(i, 8 * i)))
        for i in range(60)
    ]
    assert rates[10:34] == alone
    assert set(rates[:10]) == {alone[0]} and set(rates[34:]) == {alone[-1]}
    assert schedule_steps(config) == 24


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"schedule_begin": 10},
            r"optimizer\.schedule_begin = 10: must be before the schedule's end at iteration 10",
        ),
        ({"schedule_begin": 5, "schedule_end": 5}, r"schedule_begin = 5: must be before .* iteration 5"),
        ({"warmup_iterations": 5, "warmup_tokens": 9}, r"optimizer\.warmup_tokens = 9: must be null with"),
        ({"decay_iterations": 5, "decay_tokens": 9}, r"optimizer\.decay_tokens = 9: must be null with"),
        ({"schedule_end": 5, "decay_tokens": 9}, r"optimizer\.decay_tokens = 9: must be null with"),
        ({"schedule_end": 5, "schedule_tokens": 9}, r"optimizer\.schedule_tokens = 9: must be null with"),
    ],
)
def test_a_schedule_without_a_step_is_refused(changes, said):
    config = tiny_config()
    for key, value in changes.items():
        setattr(config.optimizer, key, value)
    with pytest.raises(ConfigError, match=said):
        config.checked()
