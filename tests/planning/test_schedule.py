"""The simulated pipeline against DeepSpeed's own schedule, closed forms and a measured run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

from megadyn.planning.schedule import Slot, in_flight, simulate, slot_of
from tests.helpers.ranks import run_on_ranks


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 7])
def test_each_slot_is_deepspeeds(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        schedule = TrainSchedule(micro_batches, stages, stage)
        theirs, seen = [], {True: 0, False: 0}
        for commands in schedule.steps():
            passes = [
                isinstance(c, ForwardPass) for c in commands if isinstance(c, (ForwardPass, BackwardPass))
            ]
            theirs.append(Slot(seen[passes[0]], passes[0]) if passes else None)
            for is_forward in passes:
                seen[is_forward] += 1
        assert [slot_of(stage, t, stages, micro_batches) for t in range(len(theirs))] == theirs
        assert len(theirs) == 2 * (micro_batches + stages - 1)


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 9])
def test_activations_held_are_counted(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        held = most = 0
        for t in range(2 * (micro_batches + stages - 1)):
            if slot := slot_of(stage, t, stages, micro_batches):
                held += 1 if slot.is_forward else -1
                most = max(most, held)
        assert most == in_flight(stage, stages, micro_batches)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (4, 4), (4, 12), (8, 64)])
def test_equal_stages_idle_as_the_closed_form_says(stages: int, micro_batches: int) -> None:
    """arXiv 2104.04473, section 2.2: (p - 1) of m + p - 1 slots."""
    found = simulate([1.0] * stages, [2.0] * stages, micro_batches)
    assert found.step == pytest.approx(3 * (micro_batches + stages - 1))
    assert found.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_a_slow_stage_sets_the_pace() -> None:
    found = simulate([1.0, 3.0, 1.0], [1.0, 5.0, 1.0], 100)
    assert found.step == pytest.approx(100 * 8 + 4, rel=0.01)
    assert found.busy == [200.0, 800.0, 200.0]


def test_two_micro_batches_by_hand() -> None:
    """Stage 0 does F0 0-1 and F1 1-2 and waits; stage 1 F0 1-4 and B0 4-8. They meet: stage 0 does B0 8-10 and waits, stage 1
    F1 8-11 and B1 11-15. They meet: stage 0 does B1 15-17. What crosses: an activation, one and a gradient, a gradient."""
    assert simulate([1.0, 3.0], [2.0, 4.0], 2).step == 17
    assert simulate([1.0, 3.0], [2.0, 4.0], 2, send=0.5).step == 17 + 4 * 0.5


def test_one_stage_sends_nothing() -> None:
    assert simulate([1.0], [2.0], 5, send=100.0).step == 15


CASES: list[tuple[list[float], int]] = [([0.03, 0.03, 0.03], 4), ([0.06, 0.02, 0.04], 3)]
"""Seconds of each stage's forward pass, its backward pass takes twice as long; micro-batches."""


def test_a_measured_run_takes_as_long(tmp_path: Path) -> None:
    run_on_ranks(_measure, 3, CASES, str(tmp_path / "measured.json"))
    for (forward, micro_batches), measured in zip(
        CASES, json.loads((tmp_path / "measured.json").read_text()), strict=True
    ):
        planned = simulate(forward, [2 * f for f in forward], micro_batches).step
        # Above it by what a loaded machine takes to run a tiny stage and to wake from a sleep.
        assert planned <= measured <= 1.35 * planned, (forward, planned, measured)


class _Slow(torch.autograd.Function):
    """Sleeps in forward, twice as long in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None


def _measure(cases: list[tuple[list[float], int]], output: str) -> None:
    """The best of two steps of a real engine whose stages sleep."""
    import torch.distributed as dist

    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.kinds.dense.layers import DenseLayer
    from megadyn.launch import launch
    from megadyn.parallel.grid import make_grid
    from tests.helpers.tiny import micro_batches, tiny_config, tiny_tokens

    launch.join()
    seconds = [0.0]
    plain = DenseLayer.forward

    def slow(self: Any, stream: Any) -> Any:
        out = plain(self, stream)
        return out._replace(hidden=_Slow.apply(out.hidden, seconds[0]))

    DenseLayer.forward = slow  # type: ignore[method-assign]
    found = []
    for forward, count in cases:
        config = tiny_config("dense", pipeline=3, num_layers=3)
        config.training.global_batch_size = count
        engine = Engine(config, batch_plan(config, 3), make_grid(1, 3))
        seconds[0] = forward[engine.grid.pp.rank]
        times = []
        for samples in tiny_tokens(3, samples=count):
            dist.barrier()
            start = time.perf_counter()
            engine.train_step(micro_batches(samples, 1), 1e-3)
            dist.barrier()
            times.append(time.perf_counter() - start)
        found.append(min(times[1:]))
        engine.engine.destroy()
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
