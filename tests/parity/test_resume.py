"""Stop and resume equals straight through: bit for bit at one topology, within rounding at another."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import micro_batches, tiny_tokens
from tests.parity.curves import KINDS, SEED, Case, config_of

STEPS, SAVED = 4, 2
"""Saved within the warm-up of the learning rate and of DTRNet's loss."""

SAME = [
    Case("dtf", 2, 1, 1),
    Case("dtf", 1, 2, 1),
    Case("dtf", 1, 1, 2),
    Case("dtf", 1, 2, 1, tied=True),
    Case("dtf", 1, 1, 2, zero=0),
    Case("dtf", 1, 1, 2, zero=2, muon=True),
    Case("dtf", 1, 1, 2, zero=3),
    Case("dtf", 2, 1, 1, precision="bf16", muon=True),
    Case("dtf", 1, 2, 1, precision="bf16"),
    Case("dtf", 1, 1, 2, zero=3, precision="bf16"),
]
# Every kind and causal rule; every normalisation.
SAME += [Case(kind, 1, 2, 1) for kind in KINDS if kind != "dtf"]
SAME += [Case("dtf", 1, 1, 2, norm="lns"), Case("dtf", 2, 1, 1, norm="hybridnorm")]
SAME += [Case("dtrnet-target", 1, 1, 2), Case("dtrnet-target", 1, 2, 1)]
"""Saved and resumed alike."""
ZERO_1, ZERO_3 = SAME[2], SAME[6]
"""Whose reading is counted."""
ROW = 4 * 88
"""Bytes of the widest row."""

OTHER = [
    (Case("dtf", 2, 1, 1), Case("dtf", 1, 2, 1)),
    (Case("mod", 1, 2, 1), Case("mod", 2, 1, 1, zero=0)),
    (Case("dtrnet-token", 1, 2, 1), Case("dtrnet-token", 1, 1, 2, zero=2)),
    (Case("dtrnet-expert", 1, 2, 1), Case("dtrnet-expert", 2, 1, 1)),
    (Case("dense", 1, 2, 1), Case("dense", 1, 1, 2, zero=3)),
    (Case("dtf", 1, 2, 1), Case("dtf", 1, 1, 2, zero=3)),
    (Case("dtf", 2, 1, 1), Case("dtf", 1, 1, 2, zero=3)),
    (Case("dtf", 1, 1, 2, zero=3), Case("dtf", 2, 1, 1, zero=0)),
    (Case("dtf", 1, 2, 1, tied=True), Case("dtf", 2, 1, 1, tied=True)),
    (Case("dtrnet-target", 1, 2, 1), Case("dtrnet-target", 2, 1, 1)),
    (Case("dtf", 1, 1, 2, zero=2, muon=True), Case("dtf", 2, 1, 1, zero=0, muon=True)),
    (Case("dtf", 1, 1, 2, zero=2, muon=True), Case("dtf", 1, 1, 2, zero=3, muon=True)),
]
"""Saved as the first, resumed as the second: any cut, any ZeRO stage."""


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, list[float]]
    trackers: list[dict[str, float]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    run_on_ranks(_run_all, 2, str(folder))
    return json.loads((folder / "runs.json").read_text())


def _run_all(folder: str) -> None:
    from megadyn.launch import launch

    launch.join()
    found: dict[str, Any] = {}
    for case in SAME:
        found[f"{case} straight"] = train(case, range(STEPS), save_to=Path(folder) / str(case))
        found[f"{case} resumed"] = train(case, range(SAVED, STEPS), load_from=Path(folder) / str(case))
    for saved, resumed in OTHER:
        found[f"{saved} to {resumed}"] = train(
            resumed, range(SAVED, STEPS), load_from=Path(folder) / str(saved)
        )
    found["read"] = {str(case): _read(case, Path(folder) / str(case)) for case in (ZERO_1, ZERO_3)}
    if dist.get_rank() == 0:
        (Path(folder) / "runs.json").write_text(json.dumps(found))


class CountedFile:
    """A file of a checkpoint that notes the bytes which are read of each tensor."""

    def __init__(self, opened: Any, read: dict[str, int]) -> None:
        self.opened, self.read = opened, read

    def keys(self) -> list[str]:
        return self.opened.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.get_slice(name)[:]

    def get_slice(self, name: str) -> "CountedSlice":
        return CountedSlice(self.opened.get_slice(name), self.read, name)


class CountedSlice(NamedTuple):
    opened: Any
    read: dict[str, int]
    name: str

    def get_shape(self) -> list[int]:
        return self.opened.get_shape()

    def __getitem__(self, rows: Any) -> torch.Tensor:
        found = self.opened[rows]
        self.read[self.name] = self.read.get(self.name, 0) + found.nbytes
        return found


def _read(case: Case, saved: Path) -> list[dict[str, int]]:
    """What each rank reads when it resumes: bytes by tensor."""
    from megadyn.checkpoint import merge
    from megadyn.parallel.objects import all_gather

    known, read = merge.safe_open, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "safe_open", lambda path, **options: CountedFile(known(path, **options), read))
        train(case, range(0), load_from=saved)
    return all_gather(read)


def train(case: Case, steps: range, save_to: Path | None = None, load_from: Path | None = None) -> Trained:
    """Trains these steps; saves after `SAVED` of them all, and goes on."""
    from megadyn.checkpoint import save_load
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.engine.optimizer import learning_rate
    from megadyn.network import trackers_of
    from megadyn.parallel.grid import make_grid
    from megadyn.parallel.params import name_of

    config = config_of(case)
    if hasattr(config.model.routing, "jitter"):
        config.model.routing.jitter = 0.0  # its noise follows from the seed, which
    # gives other starting weights, so that loading must replace them all
    config.training.seed += load_from is not None
    plan = batch_plan(config, dist.get_world_size())
    engine = Engine(config, plan, make_grid(case.tensor, case.pipeline))
    config.training.seed = config_of(case).training.seed
    if load_from is not None:
        found = save_load.newest_good(load_from)
        assert found is not None
        assert save_load.load(engine, found)["iteration"] == SAVED
    share, rank = plan.global_batch // plan.data_parallel, engine.grid.dp.rank
    losses, norms = [], []
    tokens = tiny_tokens(STEPS, seed=SEED)
    for step in steps:
        batches = micro_batches(tokens[step][rank * share : (rank + 1) * share], case.micro_batch)
        result = engine.train_step(batches, learning_rate(config.optimizer, step, STEPS))
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        if save_to is not None and step + 1 == SAVED:
            save_load.save(engine, save_to, iteration=SAVED, consumed_samples=4 * SAVED)
    access = save_load.OptimizerAccess(engine)
    weights = {
        name_of(p): access.get(p)["weight"].double().flatten()[:50].tolist() for p in engine.parameters()
    }
    trackers = [
        tracker for of_layers in trackers_of(engine.routed).values() for tracker in of_layers.values()
    ]
    engine.engine.destroy()
    return Trained(losses, norms, weights, [tracker.state() for tracker in trackers])


@pytest.mark.parametrize("case", SAME, ids=str)
def test_resumed_is_straight_bit_for_bit(case: Case, runs: dict[str, Any]) -> None:
    straight, resumed = (Trained(*runs[f"{case} {how}"]) for how in ("straight", "resumed"))
    # weights, thresholds and loads of rank 0
    assert resumed == straight._replace(losses=straight.losses[SAVED:], norms=straight.norms[SAVED:])


@pytest.mark.parametrize(("saved", "resumed"), OTHER, ids=str)
def test_resumed_at_another_topology_goes_on_alike(saved: Case, resumed: Case, runs: dict[str, Any]) -> None:
    losses, norms, *_ = runs[f"{saved} to {resumed}"]
    want_losses, want_norms, *_ = runs[f"{saved} straight"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses[SAVED:]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(want_norms[SAVED:]), rtol=1e-5, atol=0)


def test_a_rank_reads_only_the_moments_that_it_holds(runs: dict[str, Any]) -> None:
    """Under ZeRO 1, the moments of all parameters once, and of few twice, whose numbers two ranks share."""
    first, second = ({name for name in read if "/" in name} for read in runs["read"][str(ZERO_1)])
    groups = 4  # of the optimizer, each cut once; two moments
    assert first and second
    assert len(first & second) <= 2 * groups < len(first | second) / 2


def test_under_zero_3_a_rank_reads_its_own_rows_alone(runs: dict[str, Any]) -> None:
    """Of each weight and moment a half; where a row lies in both halves, both ranks read it."""
    whole, halves = runs["read"][str(ZERO_1)][0], runs["read"][str(ZERO_3)]
    assert (
        halves[0].keys() == halves[1].keys() == {name for read in runs["read"][str(ZERO_1)] for name in read}
    )
    for name in halves[0]:
        size, read = whole[name.partition("/")[0]], [half[name] for half in halves]
        assert size <= sum(read) <= size + ROW and abs(read[0] - read[1]) <= ROW, name
