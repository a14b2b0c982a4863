"""What the main job asks of its parts."""

from types import SimpleNamespace

import pytest
import torch

from megadyn.config import BatchPlan
from megadyn.parallel.grid import Axis, Grid
from megadyn.pretrain import Job
from tests.training.test_loader import Counting


@pytest.mark.parametrize(
    ("stage", "stages", "reads"), [(0, 1, True), (0, 3, True), (1, 3, False), (2, 3, True)]
)
def test_only_stages_that_need_tokens_read_them(stage, stages, reads):
    """The first embeds tokens, the last scores them against labels."""
    engine = SimpleNamespace(
        grid=Grid(pp=Axis("pp", stage, stages), dp=Axis("dp", 1, 2)),
        plan=BatchPlan(8, 2, 2, 2),
        device=torch.device("cpu"),
    )
    samples = Counting()
    with Job.loader(SimpleNamespace(engine=engine), samples, 16, 32, step=8) as loader:
        firsts = [int(tokens[0, 0]) // 10 for tokens, _ in loader]
    # the second data-parallel rank's halves of two steps
    assert firsts == ([20, 22, 28, 30] if reads else [])
    assert bool(samples.taken) == reads
