"""The quickstart's model over 200 steps, recorded on one process and replayed under other layouts."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.ranks import run_on_ranks
from tests.routing.replayed import ONE, Curve, Layout, curve_of

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "config.yaml"
STEPS = 200
RATE = 1e-4
"""A twentieth of the quickstart's own, at which any model amplifies rounding with each step (benchmarks/flips.md)."""
LAYOUTS = (Layout(tensor=2, micro_batch=4),)
VOCAB, LENGTH = 512, 16


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels [4, LENGTH]: samples that count upwards, each by a stride of its own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        start = torch.randint(VOCAB, (4, 1), generator=generator)
        stride = torch.randint(1, 8, (4, 1), generator=generator)
        samples = (start + stride * torch.arange(LENGTH + 1)) % VOCAB
        yield samples[:, :-1].contiguous(), samples[:, 1:].contiguous()


def train(layout: Layout, record: Path, replay: Path | None = None) -> Curve:
    from megadyn.config import load_config

    config = load_config(
        QUICKSTART,
        [
            f"model.vocab_size={VOCAB}",
            "deepspeed_config=zero0",
            f"training.iterations={STEPS}",
            "training.global_batch_size=4",
            f"training.micro_batch_size={layout.micro_batch}",
            f"training.sequence_length={LENGTH}",
            f"training.routing_record={record}",
            f"training.routing_replay={replay or 'null'}",
            f"parallel.tensor={layout.tensor}",
            f"parallel.pipeline={layout.pipeline}",
        ],
    )
    return curve_of(config, layout, batches(), RATE)


def train_all(folder: Path) -> dict[str, Curve]:
    """By layout; what its layers chose, or would have chosen themselves, in FOLDER/LAYOUT."""
    run_on_ranks(_train_one, 1, str(folder))
    run_on_ranks(_replay_all, 2, str(folder))
    return json.loads((folder / "one.json").read_text()) | json.loads((folder / "two.json").read_text())


def _train_one(to: str) -> None:
    from megadyn.launch import launch

    launch.join()
    found = {str(ONE): train(ONE._replace(micro_batch=4), Path(to) / str(ONE))}
    (Path(to) / "one.json").write_text(json.dumps(found))


def _replay_all(to: str) -> None:
    from megadyn.launch import launch

    launch.join()
    folder = Path(to)
    found = {str(layout): train(layout, folder / str(layout), folder / str(ONE)) for layout in LAYOUTS}
    if dist.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(found))
