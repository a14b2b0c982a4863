"""What goes wrong in a run leaves what was good: checkpoints intact, nothing half-written, one clear sentence."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from megadyn.checkpoint.export import export
from megadyn.errors import UserError
from megadyn.launch import launch
from megadyn.pretrain import main
from megadyn.telemetry.sinks import finite
from tests.helpers.crew import Crew, lines
from tests.helpers.sabotage import full_disk, slow_disk, small_files
from tests.helpers.tiny import ROOT


class Done(NamedTuple):
    returncode: int
    output: str


def train(
    config_file: Path, *overrides: str, world: int = 1, sabotage: Callable[[int], None] | None = None
) -> Done:
    crew = Crew(config_file, *overrides, world=world, sabotage=sabotage)
    return Done(max(crew.wait()), crew.output())


def test_a_file_that_cannot_be_written_leaves_earlier_checkpoints(config_file: Path) -> None:
    assert train(config_file, "training.iterations=3").returncode == 0
    checkpoints = config_file.parent / "out/checkpoints"
    before = {path.name for path in checkpoints.iterdir()}
    done = train(config_file, sabotage=partial(small_files, limit=50_000))  # smaller than the weights
    assert done.returncode == 1
    assert "checkpoint not written (rank 0: " in done.output
    assert "Traceback" not in done.output
    assert {path.name for path in checkpoints.iterdir()} == before
    assert train(config_file).returncode == 0  # and it goes on once there is room


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_on_one_rank_stops_the_run_or_not_as_configured(
    background: bool, config_file: Path
) -> None:
    settings = (
        "parallel.tensor=2",
        "data.validation_fraction=0",
        "checkpoint.interval=2",
        f"checkpoint.background={background}",
    )
    fails_second = partial(full_disk, victim=1, saves=[2])
    done = train(config_file, *settings, world=2, sabotage=fails_second)
    assert done.returncode == 1
    stopped = "checkpoint not written (rank 1: OSError: [Errno 28] No space left on device"
    assert stopped in done.output
    checkpoints = config_file.parent / "out/checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"iteration-00000002", "latest"}

    fails_first = partial(full_disk, victim=1, saves=[1])
    done = train(config_file, *settings, "checkpoint.on_error=continue", world=2, sabotage=fails_first)
    assert done.returncode == 0, done.output
    assert stopped in done.output
    assert "the run continues; its newest checkpoint is from iteration 2" in done.output
    assert {path.name for path in checkpoints.iterdir()} == {
        "iteration-00000002",
        "iteration-00000006",
        "latest",
    }
    assert any(
        "error" in line["checkpoint"] for line in lines(config_file.parent / "out") if "checkpoint" in line
    )


def test_the_last_checkpoint_must_be_written(config_file: Path) -> None:
    done = train(
        config_file, "checkpoint.on_error=continue", sabotage=partial(full_disk, victim=0, saves=[1])
    )
    assert done.returncode == 1
    assert "checkpoint not written" in done.output


def test_saving_in_the_background_holds_training_up_for_the_copy_alone(config_file: Path) -> None:
    # whose weights are the model's own, not a copy
    quiet = (
        "data.validation_fraction=0",
        "parallel.tensor=2",
        "checkpoint.keep=0",
        "checkpoint.interval=2",
        f"deepspeed_config={ROOT}/ds_configs/zero0.json",
    )
    slowly = partial(slow_disk, seconds=0.5)  # two files a rank and save
    assert train(config_file, *quiet, "checkpoint.background=true", world=2, sabotage=slowly).returncode == 0
    assert train(config_file, *quiet, f"output_dir={config_file.parent}/direct", world=2).returncode == 0
    saves = [line["checkpoint"] for line in lines(config_file.parent / "out") if "checkpoint" in line]
    assert [save["iteration"] for save in saves] == [2, 4, 6]
    assert all(save["write_s"] > 1 and save["rank_bytes"] > 0 for save in saves)
    steps = [line for line in lines(config_file.parent / "out") if "checkpoint" in line or "lm_loss" in line]
    first = next(place for place, line in enumerate(steps) if "checkpoint" in line)
    assert steps[first - 1]["iteration"] >= 3  # training went on while the first one was written
    for iteration in (2, 4, 6):  # and what was written is what was there when the copy was made
        mine, direct = (
            tensors(config_file.parent / run / f"checkpoints/iteration-{iteration:08d}")
            for run in ("out", "direct")
        )
        assert mine == direct


def tensors(checkpoint: Path) -> dict[str, str]:
    """Digests of a checkpoint's tensor files."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def test_no_whole_checkpoint_is_no_reason_to_begin_anew(config_file: Path) -> None:
    assert train(config_file, "training.iterations=2").returncode == 0
    metrics = (config_file.parent / "out/metrics.jsonl").read_text()
    (shard,) = (config_file.parent / "out/checkpoints").glob("*/weights-*")
    shard.write_bytes(shard.read_bytes() + b"x")
    done = train(config_file)
    assert done.returncode == 2
    assert "none of 1 checkpoints is intact" in done.output
    assert (config_file.parent / "out/metrics.jsonl").read_text() == metrics


def test_other_training_data_are_refused(config_file: Path) -> None:
    assert train(config_file, "training.iterations=2").returncode == 0
    done = train(config_file, "data.validation_fraction=0.3")
    assert done.returncode == 2
    assert "trained on other data or in another order" in done.output
    assert (
        train(config_file, "data.validation_fraction=0.3", "checkpoint.allow_other_data=true").returncode == 0
    )


def test_export_replaces_nothing_but_an_export(config_file: Path, tmp_path: Path) -> None:
    assert train(config_file, "training.iterations=2").returncode == 0
    run = config_file.parent / "out"
    (checkpoint,) = (run / "checkpoints").glob("iteration-*")
    shard = next(checkpoint.glob("weights-*"))
    assert shard.stat().st_mode & 0o777 == 0o666 & ~umask()
    for output in (run, checkpoint, config_file.parent):
        with pytest.raises(UserError, match="not an earlier export"):
            export(checkpoint, output, overwrite=True)
    output = tmp_path / "export"
    export(checkpoint, output)
    with pytest.raises(UserError, match="pass --overwrite"):
        export(checkpoint, output)
    (output / "mine.txt").write_text("left over")
    export(checkpoint, output, overwrite=True)
    assert not (output / "mine.txt").exists()
    assert (output / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_output_folder_that_cannot_be_is_refused(
    config_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (config_file.parent / "file").write_text("")
    assert main([str(config_file), f"output_dir={config_file.parent}/file/out"]) == 2
    assert "file/out: Not a directory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            ("3", "4", "1"),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, ("2", "4", "0")),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            ("5", "8", "1"),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
            (None, None, None),
        ),  # sbatch, no srun
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_COMM_WORLD_SIZE": "9",
            },
            ("1", "2", "1"),
        ),
    ],
)
def test_ranks_of_every_launcher(
    given: dict[str, str], want: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} | {
        name for names in launch.MPI_VARIABLES.values() for name in names
    }
    monkeypatch.setattr(
        os, "environ", {name: value for name, value in os.environ.items() if name not in known} | given
    )
    launch.adopt_mpi_ranks()
    assert tuple(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) == want


def test_metrics_hold_no_number_that_json_lacks() -> None:
    record = finite({"grad_norm": float("inf"), "routing": {"0": {"f": float("nan"), "g": 1.5}}})
    assert (
        json.dumps(record, allow_nan=False) == '{"grad_norm": null, "routing": {"0": {"f": null, "g": 1.5}}}'
    )
