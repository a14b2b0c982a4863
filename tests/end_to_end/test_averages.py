"""Averages that a run writes beside its checkpoints, and what of the run they leave as it is."""

from functools import partial
from pathlib import Path

import pytest
import torch

from megadyn.checkpoint import averaging, layout
from megadyn.checkpoint.merge import ShardedTensors
from tests.helpers.crew import Crew, lines


def no_room_for_averages(rank: int, *, victim: int) -> None:
    """The victim's disk is full when it writes its part of an average."""

    def save_file(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if rank == victim:
        averaging.save_file = save_file


def at(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    source = ShardedTensors(folder / layout.folder_name(iteration), "weights")
    return {name: source.whole(name) for name in source.names()}


def assert_is_mean(out: Path, of: dict[int, float], iteration: int) -> None:
    """The average beside `iteration` is that of the checkpoints `of`, with these coefficients."""
    parts = {step: at(out / "checkpoints", step) for step in of}
    for name, tensor in at(out / "averages", iteration).items():
        mean = sum(weight * parts[step][name].double() for step, weight in of.items())
        torch.testing.assert_close(tensor, mean.float(), rtol=1e-6, atol=1e-7)


def averaged(out: Path) -> dict[int, int]:
    """Iteration -> number of checkpoints in its average, as reported."""
    events = [line["checkpoint"] for line in lines(out) if "checkpoint" in line]
    return {event["iteration"]: event["averaged"] for event in events if "averaged" in event}


def test_a_run_writes_averages_beside_its_checkpoints(config_file: Path, tmp_path: Path) -> None:
    """The last two; then a moving average in the background, over another layout; then with a damaged one between."""
    settings = ["checkpoint.interval=1", "data.validation_fraction=0"]
    out, last = tmp_path / "out", "checkpoint.average.last="
    first = [*settings, f"{last}2", "checkpoint.keep=0", "training.iterations=3"]
    crew = Crew(config_file, *first, "parallel.tensor=2", world=2)
    assert crew.wait() == [0, 0], crew.output()
    assert averaged(out) == {1: 1, 2: 2, 3: 2}
    assert_is_mean(out, {2: 1 / 2, 3: 1 / 2}, 3)
    assert layout.resolve(out).parent.name == "checkpoints"
    assert layout.resolve(out / "averages").name == layout.folder_name(3)

    moving = ["checkpoint.average.ema=0.75", "checkpoint.background=true"]
    crew = Crew(config_file, *settings, *moving, "checkpoint.keep=0")
    assert crew.wait() == [0], crew.output()
    assert averaged(out) == {1: 1, 2: 2, 3: 2, 4: 1, 5: 2, 6: 2}
    assert_is_mean(out, {4: 0.75**2, 5: 0.75 * 0.25, 6: 0.25}, 6)

    damaged = next((out / "checkpoints" / layout.folder_name(5)).glob("weights-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    crew = Crew(config_file, *settings, f"{last}3", "checkpoint.keep=3", "training.iterations=7")
    assert crew.wait() == [0], crew.output()
    assert f"left out of the average: {damaged}" in crew.output()
    assert_is_mean(out, {6: 1 / 2, 7: 1 / 2}, 7)
    for folder in ("checkpoints", "averages"):
        kept = sorted(layout.iteration_of(path) for path in (out / folder).glob("iteration-*"))
        assert kept == [5, 6, 7], folder


def test_averages_change_nothing_else_of_a_run(config_file: Path, tmp_path: Path) -> None:
    settings = ["checkpoint.interval=3", "checkpoint.keep=3", "data.validation_fraction=0"]
    for name, more in (("with", ["checkpoint.average.last=2"]), ("without", [])):
        crew = Crew(config_file, *settings, *more, f"output_dir={tmp_path}/{name}")
        assert crew.wait() == [0], crew.output()
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if (path.is_file() and path.suffix == ".safetensors") or path.name == "latest"
        }
        for folder in (tmp_path / "with/checkpoints", tmp_path / "without/checkpoints")
    ]
    assert len(files[0]) > 3 and files[0] == files[1]
    assert not (tmp_path / "without/averages").exists()


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_an_average_that_cannot_be_written_costs_no_checkpoint(
    policy: str, config_file: Path, tmp_path: Path
) -> None:
    settings = ["checkpoint.interval=3", "checkpoint.average.ema=0.5", f"checkpoint.on_error={policy}"]
    crew = Crew(
        config_file,
        *settings,
        "data.validation_fraction=0",
        world=2,
        sabotage=partial(no_room_for_averages, victim=1),
    )
    assert crew.wait() == ([0, 0] if policy == "continue" else [1, 1]), crew.output()
    assert "averages: average not written (rank 1: OSError" in crew.output()
    out = tmp_path / "out"
    newest = layout.complete_checkpoints(out / "checkpoints")[0]
    assert layout.iteration_of(newest) == (6 if policy == "continue" else 3)
    assert layout.damage(newest, sorted(layout.read_manifest(newest)["files"])) is None
    assert list((out / "averages").iterdir()) == []
    assert "average_error" in next(line["checkpoint"] for line in lines(out) if "checkpoint" in line)
