"""What goes wrong in a run leaves what was good: checkpoints intact, nothing half-written, one clear sentence."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megadyn.checkpoint.export import export
from megadyn.errors import UserError
from megadyn.pretrain import main
from megadyn.training import launch
from megadyn.training.telemetry import finite
from tests.tiny import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def train(config_file: Path, *overrides: str, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run([sys.executable, "-m", "megadyn.pretrain", str(config_file), *overrides], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit)


def test_a_file_that_cannot_be_written_leaves_earlier_checkpoints(config_file: Path) -> None:
    assert train(config_file, "training.iterations=3").returncode == 0
    checkpoints = config_file.parent / "out/checkpoints"
    before = {path.name for path in checkpoints.iterdir()}
    done = train(config_file, file_limit=50_000)            # smaller than the weights, as on a full disk
    assert done.returncode == 1
    assert "checkpoint not written (rank 0: " in done.stderr
    assert {path.name for path in checkpoints.iterdir()} == before
    assert train(config_file).returncode == 0                # and it goes on once there is room


def test_diverged_weights_are_never_saved(config_file: Path) -> None:
    done = train(config_file, "optimizer.learning_rate=1e30", "optimizer.warmup_iterations=0", "logging.interval=100",
                 "checkpoint.interval=1", "checkpoint.keep=0", f"deepspeed_config={ROOT}/ds_configs/zero0.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: step 2 (samples 4 to 7) is bad: a loss of nan; ")
    assert "Traceback" not in done.stderr
    for shard in (config_file.parent / "out/checkpoints").glob("*/weights-*"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(shard).values()), shard


def test_no_whole_checkpoint_is_no_reason_to_begin_anew(config_file: Path) -> None:
    assert train(config_file, "training.iterations=2").returncode == 0
    metrics = (config_file.parent / "out/metrics.jsonl").read_text()
    shard, = (config_file.parent / "out/checkpoints").glob("*/weights-*")
    shard.write_bytes(shard.read_bytes() + b"x")
    done = train(config_file)
    assert done.returncode == 2
    assert "none of 1 checkpoints is whole" in done.stderr
    assert (config_file.parent / "out/metrics.jsonl").read_text() == metrics


def test_other_training_data_are_refused(config_file: Path) -> None:
    assert train(config_file, "training.iterations=2").returncode == 0
    done = train(config_file, "data.validation_fraction=0.3")
    assert done.returncode == 2
    assert "trained on other data or in another order" in done.stderr
    assert train(config_file, "data.validation_fraction=0.3", "checkpoint.allow_other_data=true").returncode == 0


def test_export_replaces_nothing_but_an_export(config_file: Path, tmp_path: Path) -> None:
    assert train(config_file, "training.iterations=2").returncode == 0
    run = config_file.parent / "out"
    checkpoint, = (run / "checkpoints").glob("iteration-*")
    shard = next(checkpoint.glob("weights-*"))
    assert shard.stat().st_mode & 0o777 == 0o666 & ~umask()
    for output in (run, checkpoint, config_file.parent):
        with pytest.raises(UserError, match="no earlier export"):
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


def test_an_output_folder_that_cannot_be_is_refused(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (config_file.parent / "file").write_text("")
    assert main([str(config_file), f"output_dir={config_file.parent}/file/out"]) == 2
    assert "file/out: Not a directory" in capfd.readouterr().err


@pytest.mark.parametrize(("given", "want"), [
    ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, ("3", "4", "1")),
    ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, ("2", "4", "0")),
    ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, ("5", "8", "1")),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (None, None, None)),      # sbatch, no srun
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "9"},
     ("1", "2", "1")),
])
def test_ranks_of_every_launcher(given: dict[str, str], want: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} | {name for names in launch.MPI_VARIABLES.values() for name in names}
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in known} | given)
    launch.adopt_mpi_ranks()
    assert tuple(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) == want


def test_metrics_hold_no_number_that_json_lacks() -> None:
    record = finite({"grad_norm": float("inf"), "routing": {"0": {"f": float("nan"), "g": 1.5}}})
    assert json.dumps(record, allow_nan=False) == '{"grad_norm": null, "routing": {"0": {"f": null, "g": 1.5}}}'
