"""How often ranks ask each other whether to stop, and that they stop after the same step."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from megadyn.launch import signals as module
from megadyn.launch.signals import MOST_STEPS, Signals
from tests.helpers.ranks import run_on_ranks


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("step", "apart"), [(30.0, 1), (1.0, 1), (0.6, 1), (0.25, 4), (0.001, MOST_STEPS), (0.0, MOST_STEPS)]
)
def test_ranks_ask_once_a_second_or_every_step(step: float, apart: int, tmp_path: Path) -> None:
    """Steps of 1 s or more ask each time, as a run of long steps must not stop a step too late."""
    run_on_ranks(_ask, 2, step, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    asked, stopped = first
    assert asked[:2] == [1, 2]  # how long a step takes is known from the second question on
    assert {b - a for a, b in pairwise(asked[1:])} == {apart}
    assert 60 <= stopped < 60 + apart, "rank 1 was asked to stop in step 60, both end together"


def _ask(step: float, folder: str) -> None:
    rank = dist.get_rank()
    clock, reduced, all_reduce = Clock(), [], dist.all_reduce
    dist.all_reduce = lambda *args, **settings: (reduced.append(number), all_reduce(*args, **settings))
    module.time = clock
    asked = Signals()
    for number in range(1, 200):
        clock.now += step * (1 if rank else 0.9)  # clocks differ
        if rank == 1 and number == 60:
            os.kill(os.getpid(), signal.SIGUSR1)
        if asked.ask().stop:
            break
    assert asked.reason() == "SIGUSR1"
    dist.all_reduce = all_reduce
    (Path(folder) / f"{rank}.json").write_text(json.dumps([reduced, number]))


def test_a_rank_at_work_is_not_idle() -> None:
    run_on_ranks(_busy, 2)


def _busy() -> None:
    asked = Signals()
    assert not asked.ask(is_busy=dist.get_rank() == 1).is_idle
    assert asked.ask().is_idle
