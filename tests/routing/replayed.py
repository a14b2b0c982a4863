"""Training whose choices are ties up to rounding, recorded on one process and replayed under other layouts.

A sample is one token again and again: all its hidden states are equal but for rounding, and so are its scores, of which any
layout may rank others first. Labels are drawn at random, so it matters which tokens a layer takes.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.routing.recording import Recording
from tests.helpers.networks import with_routing
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import VOCAB, tiny_config

STEPS = 4
KEYS: dict[str, dict[str, Any]] = {
    "dtf": {},
    "mod": {},
    "dtrnet-token": {"safe_min_attn_ratio": 0.5},  # filled up to half of a sample: of equal scores
    "nested": {},  # its threshold starts in the midst of the scores
}
"""What is trained, of tests/helpers/tiny.py, and what is set beyond it."""


class Layout(NamedTuple):
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: str = "none"
    micro_batch: int = 2

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"t{self.tensor}p{self.pipeline}d{self.data}{'-sequence' * self.sequence}"


ONE = Layout()
TENSOR = Layout(tensor=2)
LAYOUTS = (
    Layout(tensor=2, sequence=True, recompute="full"),
    Layout(pipeline=2, micro_batch=1),
    Layout(data=2, micro_batch=1),
)
DISTURBED = 3
"""Step in which a recording is changed."""
Curve = dict[str, list[float]]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [4, 24] of a step."""
    generator = torch.Generator().manual_seed(step)
    tokens, labels = (torch.randint(VOCAB, (4, length), generator=generator) for length in (1, 24))
    return tokens.expand(4, 24).contiguous(), labels


def train(
    kind: str,
    layout: Layout,
    steps: int = STEPS,
    *,
    record: Path | None = None,
    replay: Path | None = None,
    **routing: Any,
) -> Curve:
    """The tiny model of a kind, trained on samples of one token each."""
    config = with_routing(
        tiny_config(
            kind,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            micro_batch=layout.micro_batch,
            recompute=layout.recompute,
        ),
        **KEYS[kind] | routing,
    )
    config.parallel.sequence = layout.sequence
    config.training.routing_record = record and str(record)
    config.training.routing_replay = replay and str(replay)
    return curve_of(config, layout, map(batch, range(steps)), rate=1e-3)


def curve_of(config: Any, layout: Layout, batches: Iterable[tuple[Tensor, Tensor]], rate: float) -> Curve:
    """Losses and gradient norms of steps on these batches of four samples."""
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.network import choosing_layers
    from megadyn.parallel.grid import make_grid
    from megadyn.routing.replay import Replay

    grid = make_grid(layout.tensor, layout.pipeline)
    engine = Engine(config, batch_plan(config, layout.world), grid)
    choices = Replay(config, engine.routed, choosing_layers(config.model), grid, "data")
    share = 4 // layout.data
    found: Curve = {"loss": [], "grad_norm": []}
    for step, samples in enumerate(batches):
        mine = [
            x[grid.dp.rank * share : (grid.dp.rank + 1) * share].split(layout.micro_batch) for x in samples
        ]
        with choices.step(step + 1, 4 * step):
            result = engine.train_step(zip(*mine, strict=True), rate)
        found["loss"].append(float(result.loss))
        found["grad_norm"].append(float(result.grad_norm))
    engine.engine.destroy()
    return found


def middle(folder: Path) -> float:
    """A score in the first step and layer of a recording, with about as many ties above as below."""
    recording = Recording(folder)
    scores = recording.read(int(next(iter(recording.about().layers))), 1).score
    return float(np.sort(scores[0])[scores.shape[1] // 2])


def disturb(folder: Path, to: Path) -> None:
    """A copy of a recording in which, in one step and layer, a token of a sample takes the place of another, or is left out."""
    shutil.copytree(folder, to)
    recording = Recording(to)
    layer = int(next(iter(recording.about().layers)))
    recorded = recording.read(layer, DISTURBED)
    row = recorded.chosen[0]
    if row.all() or not row.any():
        row[0] = ~row[0]
    else:
        row[[row.argmax(), row.argmin()]] = row[[row.argmin(), row.argmax()]]
    recording.write(layer, DISTURBED, recorded)


def record_all(folder: Path) -> dict[str, Curve]:
    """On one process, by kind; recordings in FOLDER/KIND/one. By kind and recording: of the first steps, replayed there."""
    run_on_ranks(_record_all, 1, str(folder))
    return json.loads((folder / "one.json").read_text())


def _record_all(to: str) -> None:
    from megadyn.launch import launch

    launch.join()
    folder, found = Path(to), {}
    for kind in KEYS:
        (folder / kind).mkdir()
        if kind == "nested":
            train(kind, ONE, 1, record=folder / kind / "first")
        start = start_of(kind, folder)
        found[kind] = train(kind, ONE, record=folder / kind / "one", **start)
        disturb(folder / kind / "one", folder / kind / "disturbed")
        for name in ("one", "disturbed"):
            found[f"{kind} {name}"] = train(kind, ONE, DISTURBED, replay=folder / kind / name, **start)
    (folder / "one.json").write_text(json.dumps(found))


def start_of(kind: str, folder: Path) -> dict[str, float]:
    return {"threshold_start": middle(folder / kind / "first")} if kind == "nested" else {}


def replay_all(folder: Path) -> dict[str, Curve]:
    """On two ranks, by kind and layout, with and without a replay; what layers would choose themselves in FOLDER/KIND/RUN."""
    run_on_ranks(_replay_all, 2, str(folder))
    return json.loads((folder / "two.json").read_text())


def _replay_all(to: str) -> None:
    from megadyn.launch import launch

    launch.join()
    folder, found = Path(to), {}
    for kind in KEYS:
        for layout in LAYOUTS:
            found[f"{kind} {layout}"] = train(
                kind,
                layout,
                record=folder / kind / str(layout),
                replay=folder / kind / "one",
                **start_of(kind, folder),
            )
        found[f"{kind} alone"] = train(kind, TENSOR, record=folder / kind / "alone", **start_of(kind, folder))
    if dist.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(found))
