"""Promises that need several ranks: training is the same under every layout, and a run goes on at another one."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megadyn.errors import ConfigError
from tests.conformance.checks import EOD, Case, config_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import ROOT, micro_batches, tiny_tokens

STEPS, SAVED = 2, 1
EVERYTHING_CUT = ROOT / "tests/parity/zero3_everything_cut.json"


class Layout(NamedTuple):
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    sequence: bool = False
    documents: bool = False
    recompute: str = "none"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        words = [f"t{self.tensor}p{self.pipeline}d{self.data}zero{self.zero}"]
        words += [
            word
            for word, on in (
                ("sequence", self.sequence),
                ("documents", self.documents),
                (self.recompute, self.recompute != "none"),
            )
            if on
        ]
        return "-".join(words)


WHOLE = (Layout(), Layout(documents=True))
"""What the others are held to: one process, ZeRO-1, nothing recomputed."""
EVERY = (Layout(tensor=2, sequence=True, documents=True), Layout(pipeline=2, documents=True))
"""Tried with every variant of a kind."""
LAYOUTS = (
    *EVERY,
    Layout(tensor=2, recompute="full"),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
)
WINDOW = {"sliding_window": 6, "window_layers": [0, 1, 3]}
"""Of layouts with documents, so that these try it too."""
RESUMED = (Layout(pipeline=2), Layout(data=2, zero=2))
"""Where a run that tensor ranks saved goes on."""


def layouts_of(case: Case) -> tuple[Layout, ...]:
    return LAYOUTS if case.variant == "default" else EVERY


Curve = dict[str, Any]
"""`loss` and `grad_norm` of each step, and `validation`: the last loss by mode; or `refused`: the sentence."""


def train_all(cases: list[Case], folder: Path) -> dict[str, Curve]:
    """By case and layout. One launch for one process, one for two."""
    found: dict[str, Curve] = {}
    for world in (1, 2):
        run_on_ranks(_train_all, world, cases, world, str(folder), sys.path)
        found |= json.loads((folder / f"world{world}.json").read_text())
    return found


def _train_all(cases: list[Case], world: int, folder: str, path: list[str]) -> None:
    sys.path[:] = path  # of the test: it may lead to a kind outside the repository
    from megadyn.launch import launch

    launch.join()
    found = {}
    for case in cases:
        for layout in (*WHOLE, *layouts_of(case)):
            if layout.world == world:
                found[f"{case} {layout}"] = curve(case, layout)
        if world == 2 and case.variant == "default":
            saved = Path(folder) / str(case)
            curve(case, Layout(tensor=2), range(SAVED), save_to=saved)
            for layout in RESUMED:
                found[f"{case} {layout} resumed"] = curve(case, layout, range(SAVED, STEPS), load_from=saved)
    if dist.get_rank() == 0:
        (Path(folder) / f"world{world}.json").write_text(json.dumps(found))


def curve(
    case: Case,
    layout: Layout,
    steps: range = range(STEPS),
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> Curve:
    from megadyn.checkpoint import save_load
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.parallel.grid import make_grid

    micro_batch = 1 if layout.data > 1 else 2  # two of them on each rank: enough to accumulate over
    try:
        config = config_of(
            case,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            zero=layout.zero,
            sequence=layout.sequence,
            recompute=layout.recompute,
            micro_batch=micro_batch,
            **(WINDOW if layout.documents else {}),
        )
    except ConfigError as error:
        return {"refused": str(error)}
    if layout.zero == 3:
        config.deepspeed_config = str(EVERYTHING_CUT)
    plan, grid = batch_plan(config, layout.world), make_grid(layout.tensor, layout.pipeline)
    engine = Engine(config, plan, grid, EOD if layout.documents else None)
    if load_from is not None:
        access = save_load.OptimizerAccess(engine)
        for param in engine.parameters():  # no weight may stay as it is
            access.set(param, {"weight": torch.zeros_like(access.get(param)["weight"])})
        folder = save_load.newest_good(load_from)
        assert folder is not None
        save_load.load(engine, folder)
    share = plan.global_batch // plan.data_parallel
    found: Curve = {"loss": [], "grad_norm": []}
    batches: list[Any] = []
    for step in steps:
        samples = tokens_of(layout.documents)[step][grid.dp.rank * share : (grid.dp.rank + 1) * share]
        batches = micro_batches(samples, micro_batch)
        result = engine.train_step(batches, 1e-3)
        found["loss"].append(float(result.loss))
        found["grad_norm"].append(float(result.grad_norm))
    if save_to is not None:
        save_load.save(engine, save_to, iteration=steps.stop, consumed_samples=4 * steps.stop)
    if layout.data == 1 and layout.recompute == "none" and save_to is None:
        found["validation"] = [engine.evaluate(batches, len(batches), mode) for mode in ("topk", "causal")]
    engine.engine.destroy()
    return found


def tokens_of(documents: bool) -> torch.Tensor:
    """[STEPS, 4, 25]; with documents, three in each sample, each beginning with a token of its own: beginnings alike would
    tie, and any rounding could choose between them."""
    tokens = tiny_tokens(STEPS)
    if documents:
        tokens = tokens.flip(-1).contiguous()
        tokens[tokens == EOD] += 1
        tokens[..., [7, 16]] = EOD
        tokens[..., [0, 8, 17]] = torch.tensor([10, 20, 30])
    return tokens


def farthest(got: list[float], want: list[float]) -> float:
    """Largest relative difference."""
    assert len(got) == len(want)
    return max(abs(g - w) / abs(w) for g, w in zip(got, want, strict=True))


def assert_like(found: Curve, whole: Curve, steps: range = range(STEPS)) -> None:
    for name in ("loss", "grad_norm"):
        assert farthest(found[name], whole[name][steps.start : steps.stop]) < 1e-5, name
    if "validation" in found:
        assert farthest(found["validation"], whole["validation"]) < 1e-5, "validation"
