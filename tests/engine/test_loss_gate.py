"""Bad steps: told apart, and kept out of the weights under every engine."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megadyn.engine.loss_gate import LossGate, problem_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import micro_batches, tiny_config, tiny_tokens


@pytest.mark.parametrize(
    ("loss", "norm", "applied", "can_scale_down", "want"),
    [
        (2.0, 1.0, True, False, None),
        (math.nan, 1.0, True, False, "a loss of nan"),
        (math.inf, math.inf, False, True, "a loss of inf"),
        (9.0, math.inf, False, False, "a loss of 9.0000, above 8.0000"),
        (2.0, math.inf, False, False, "a gradient norm of inf"),
        (2.0, math.inf, False, True, None),
        (9.0, math.inf, False, True, "a loss of 9.0000, above 8.0000"),
    ],
)
def test_what_makes_a_step_bad(loss, norm, applied, can_scale_down, want):
    assert problem_of(loss, norm, 8.0, was_applied=applied, can_scale_down=can_scale_down) == want


@pytest.mark.parametrize(
    ("losses", "spoiled"),
    [([1.0, 2.0], False), ([1.0, 6.0], True), ([math.nan, 1.0], True), ([6.0, 1.0], True)],
)
def test_the_gate_spoils_the_last_gradient_of_a_bad_step_alone(losses, spoiled):
    from megadyn.parallel.grid import Axis

    gate = LossGate(2, Axis("dp"))
    for _ in range(2):  # a step leaves nothing behind
        gate.limit = 3.0
        weight = torch.ones((), requires_grad=True)
        with torch.no_grad():
            gate(torch.tensor(99.0))  # an evaluation does not count
        grads = []
        for loss in losses:
            out = gate(weight * loss)
            assert torch.equal(out.detach(), torch.tensor(loss)) or math.isnan(loss)
            grads.append(torch.autograd.grad(out, weight)[0])
        assert bool(grads[1].isnan()) == spoiled
        assert math.isnan(losses[0]) or not grads[0].isnan()


# ---- under every engine --------------------------------------------------------------------------


class Layout(NamedTuple):
    zero: int
    pipeline: int = 1
    tensor: int = 1
    precision: str = "fp32"
    kind: str = "dtf"
    optimizer: str = "adamw"
    offload: bool = False
    """Whether the optimizer's states are in host memory."""

    def __str__(self) -> str:
        where = "-offload" if self.offload else ""
        return f"zero{self.zero}-p{self.pipeline}t{self.tensor}-{self.precision}-{self.kind}-{self.optimizer}{where}"


LAYOUTS = [
    Layout(1, tensor=2),
    Layout(2),
    Layout(3),
    Layout(0, pipeline=2),
    Layout(3, precision="bf16"),
    Layout(1, pipeline=2, precision="bf16"),
    Layout(1, pipeline=2, kind="dtrnet-token"),
    Layout(0, pipeline=2, optimizer="muon"),
    Layout(1, precision="fp16", optimizer="muon"),
    Layout(2, tensor=2, precision="bf16", optimizer="muon"),
    Layout(3, optimizer="muon"),
    Layout(2, offload=True),
    Layout(3, precision="bf16", offload=True),
]
NORMS = {"norm": 1.2}
"""Of a step with this factor the loss is below its limit, but the gradient's norm is above what is set for that step."""
HARMS = {"nan": math.nan, "infinity": math.inf, "spike": 100.0}
"""What a micro-batch's loss is multiplied by, on one data-parallel rank."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bad-steps")
    run_on_ranks(_run_all, 2, str(folder / "runs.json"))
    return json.loads((folder / "runs.json").read_text())


def _run_all(output: str) -> None:
    from megadyn.launch import launch

    launch.join(120)
    folder = Path(output).parent
    if dist.get_rank() == 0:
        for stage in (2, 3):
            zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
            (folder / f"offload{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    dist.barrier()
    found = {str(layout): _run(layout, folder) for layout in LAYOUTS}
    found["lowest"] = {str(zero): _overflow_at_the_lowest_scale(zero) for zero in (1, 3)}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))


def _run(layout: Layout, folder: Path) -> dict[str, Any]:
    """A good step, a bad one of each kind, and a good one; beside them the two good ones alone."""
    from megadyn import network
    from megadyn.checkpoint.save_load import OptimizerAccess
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.network import trackers_of
    from megadyn.parallel.grid import make_grid
    from megadyn.parallel.loss import linear_cross_entropy
    from megadyn.parallel.params import name_of

    config = tiny_config(
        layout.kind,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        zero=layout.zero,
        precision=layout.precision,
    )
    config.optimizer.name = layout.optimizer
    if layout.offload:
        config.deepspeed_config = str(folder / f"offload{layout.zero}.json")
    config.training.norm_spike_factor = 2.0 if layout.precision != "fp16" else 0.0
    harms = HARMS if layout.precision == "fp16" else HARMS | NORMS
    plan = batch_plan(config, dist.get_world_size())

    def train(steps: list[str]) -> dict[str, Any]:
        grid = make_grid(layout.tensor, layout.pipeline)
        engine = Engine(config, plan, grid)
        # a passed-over step halves the scale, and so rounds the next otherwise
        if layout.precision == "fp16":
            engine.engine.optimizer.loss_scaler.__dict__ |= {"cur_scale": 64.0, "scale_factor": 1.0}
        share = plan.global_batch // plan.data_parallel
        good, problems, losses = 0, [], []
        for step in steps:
            samples = tiny_tokens(2)[good][grid.dp.rank * share : (grid.dp.rank + 1) * share]
            harm = harms[step] if step in harms and grid.dp.rank == grid.dp.size - 1 else 1.0
            network.linear_cross_entropy = lambda *args, harm=harm, **kwargs: (
                linear_cross_entropy(*args, **kwargs) * harm
            )
            limit = 1e-3 if step in NORMS else 1e3
            result = engine.train_step(micro_batches(samples, 1), 1e-3, 20.0, limit)
            problems.append(result.problem)
            assert step not in NORMS or math.isfinite(float(result.grad_norm))
            if step == "good":
                losses.append(float(result.loss))
                good += 1
        access = OptimizerAccess(engine)
        state = {
            f"{name_of(p)}/{key}": value.double().flatten()[:20].tolist()
            for p in engine.parameters()
            for key, value in access.get(p).items()
        }
        trackers = [
            tracker.state()
            for of_layers in trackers_of(engine.routed).values()
            for tracker in of_layers.values()
        ]
        steps_taken = access.steps
        engine.engine.destroy()
        return {
            "problems": problems,
            "losses": losses,
            "state": state,
            "trackers": trackers,
            "steps": steps_taken,
        }

    mixed, plain = train(["good", *harms, "good"]), train(["good"] * 2)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, mixed["problems"])
    return {"mixed": mixed, "plain": plain, "problems": gathered}


def _overflow_at_the_lowest_scale(zero: int) -> list[str | None]:
    """What is said of three fp16 steps: gradients that overflow at scale 2, and at 1, and good ones."""
    from megadyn import network
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.parallel.grid import make_grid
    from megadyn.parallel.loss import linear_cross_entropy

    config = tiny_config("dtf", zero=zero, precision="fp16")
    engine = Engine(config, batch_plan(config, 2), make_grid(1, 1))
    engine.engine.optimizer.loss_scaler.__dict__ |= {"cur_scale": 2.0, "cur_hysteresis": 1}
    samples, problems = tiny_tokens(1)[0].chunk(2)[dist.get_rank()], []
    for factor in (1e7, 1e7, 1.0):
        network.linear_cross_entropy = lambda *args, factor=factor, **kwargs: (
            linear_cross_entropy(*args, **kwargs) * factor
        )
        problems.append(engine.train_step(micro_batches(samples, 1), 1e-3).problem)
    network.linear_cross_entropy = linear_cross_entropy
    engine.engine.destroy()
    return problems


@pytest.mark.parametrize("zero", ["1", "3"])
def test_gradients_that_overflow_at_the_lowest_loss_scale_are_a_bad_step(
    zero: str, runs: dict[str, Any]
) -> None:
    """At a higher one the scale falls and the step is tried anew; DeepSpeed raises a bare Exception at the lowest."""
    assert runs["lowest"][zero] == [None, "a gradient norm of inf", None]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_bad_step_leaves_no_trace(layout: Layout, runs: dict[str, Any]) -> None:
    run = runs[str(layout)]
    assert run["mixed"]["steps"] == run["plain"]["steps"] == 2
    assert run["mixed"]["losses"] == run["plain"]["losses"]
    assert run["mixed"]["state"] == run["plain"]["state"]
    assert run["mixed"]["trackers"] == run["plain"]["trackers"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_sees_the_same_problem(layout: Layout, runs: dict[str, Any]) -> None:
    first, second = runs[str(layout)]["problems"]
    assert first == second
    assert first[0] is first[-1] is None
    assert first[1:3] == ["a loss of nan", "a loss of inf"]
    assert "above 20.0000" in first[3]
    if layout.precision != "fp16":
        assert first[4].startswith("a gradient norm of ")
        assert first[4].endswith(", above 0.0010")
