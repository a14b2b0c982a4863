"""Ranks as each launcher numbers them, and processes without a device of their own."""

import os

import pytest
from deepspeed.accelerator import get_accelerator

from megadyn.errors import ConfigError, UserError
from megadyn.launch import launch
from megadyn.launch.launch import adopt_mpi_ranks, check_devices, check_precision, local_ranks

SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "11",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS_PER_NODE": "8",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "11",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
MPICH = {"PMI_RANK": "11", "PMI_SIZE": "16", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "8"}
OURS = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}


def adopted(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> dict[str, str]:
    """What a process that finds `given` in its environment takes over."""
    monkeypatch.setattr(os, "environ", dict(given))
    adopt_mpi_ranks()
    return {name: os.environ[name] for name in OURS if name in os.environ}


@pytest.mark.parametrize(
    "given", [SLURM, OPEN_MPI, MPICH, SLURM | OPEN_MPI, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"} | OPEN_MPI]
)
def test_ranks_are_taken_over_from_mpirun_and_srun(given, monkeypatch):
    assert adopted(monkeypatch, given) == OURS


def test_the_ranks_of_srun_count_where_it_sets_mpichs_too_but_no_local_rank(monkeypatch):
    assert adopted(monkeypatch, {"PMI_RANK": "11", "PMI_SIZE": "16"} | SLURM) == OURS


def test_mpichs_ranks_count_before_those_of_the_srun_that_started_its_helpers(monkeypatch):
    assert adopted(monkeypatch, SLURM | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"} | MPICH) == OURS


def test_a_rank_that_is_set_stays_and_a_command_in_an_allocation_is_alone(monkeypatch):
    assert adopted(monkeypatch, {"RANK": "5"} | SLURM) == {"RANK": "5"}
    assert (
        adopted(monkeypatch, {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) == {}
    )
    assert adopted(monkeypatch, {}) == {}


@pytest.mark.parametrize(
    ("given", "number"), [({}, 1), ({"LOCAL_WORLD_SIZE": "8"}, 8), ({"LOCAL_SIZE": "4"}, 4)]
)
def test_the_launcher_tells_how_many_processes_share_the_machine(given, number, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    assert local_ranks() == number


@pytest.mark.parametrize(
    ("local_rank", "processes", "devices", "wanted"), [(0, 8, 4, 8), (3, 1, 1, 4), (0, 1, 0, 1)]
)
def test_more_processes_than_devices_are_refused_by_each(local_rank, processes, devices, wanted):
    """The first: started with 8 a node on 4 GPUs. The second: Slurm showed each process one GPU."""
    with pytest.raises(UserError) as caught:
        check_devices(local_rank, processes, devices)
    said = str(caught.value)
    assert said.startswith(
        f"number of processes on this machine = {wanted}: must be at most the number of GPUs that each of "
        f"them sees, which is {devices}: start fewer, or "
    )
    assert "\n" not in said
    check_devices(local_rank, processes, wanted)


class OneGpu:
    def device_name(self) -> str:
        return "cuda"

    def device_count(self) -> int:
        return 1


def test_a_process_looks_for_its_device_before_it_meets_the_others(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"})
    monkeypatch.setattr(launch, "get_accelerator", OneGpu)
    with pytest.raises(UserError, match="number of processes on this machine = 2"):
        launch.join()


def test_a_precision_that_the_device_does_not_train_in_is_refused(monkeypatch):
    """DeepSpeed says so too, but with a traceback, once the model is built."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(
        ConfigError, match=r"precision = 'fp16': must be another one on this device \(cpu\), which has no "
    ):
        check_precision("fp16")
    check_precision("bf16")
    check_precision("fp32")
