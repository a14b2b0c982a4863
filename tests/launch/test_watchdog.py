"""Ranks that make no progress while others do."""

import json
import time
from pathlib import Path

import torch.distributed as dist

from megadyn.launch.watchdog import Watchdog
from tests.helpers.crew import Crew


def one_stays_behind(folder: Path) -> None:
    """The last rank never ends its step; the others take one after another, and do not wait for it."""
    with Watchdog(4.0, 60.0, output_dir=folder) as watchdog:
        number = 0
        while True:
            number += 1
            if number == 1 or dist.get_rank() < dist.get_world_size() - 1:
                watchdog.progress(f"in step {number}")
            time.sleep(0.05)


def test_a_rank_that_makes_no_progress_is_named_by_all(tmp_path: Path) -> None:
    """And a rank that is alone ends too."""
    (tmp_path / "alone").mkdir()
    alone = Crew.of_check(one_stays_behind, tmp_path / "alone", tmp_path / "alone", world=1)
    three = Crew.of_check(one_stays_behind, tmp_path, tmp_path, world=3)
    assert three.wait(60) == [1, 1, 1]
    named = f"error: rank 2 (process {three.ranks[2].pid} on "
    for rank in range(3):
        (error,) = three.errors(rank)
        assert error.startswith(named) and "made no progress for 4 s, in step 1" in error
        assert error.endswith("if that is normal") == (rank > 0)
        assert "in one_stays_behind" in three.output(rank)
        assert "made no progress" in (tmp_path / f"ended/rank{rank}-stacks.txt").read_text()
        json.loads((tmp_path / f"ended/rank{rank}-collectives.json").read_text())
    assert "; rank 2: in step 1, " in three.errors(0)[0]
    assert "; rank 1: in step " in three.errors(0)[0]  # which rank 2 does not hear
    assert alone.wait(30) == [1]
    (error,) = alone.errors()
    assert "made no progress for 4 s, in step 1; raise training.timeout_s" in error
