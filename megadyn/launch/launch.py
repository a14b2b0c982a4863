"""Joins this process to the others, whether started by deepspeed, torchrun, mpirun, srun, or alone."""

import functools
import os
import socket
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megadyn.errors import ConfigError, RunError, UserError
from megadyn.log import MPI_LOCAL_RANKS, MPI_RANKS, log

MPI_VARIABLES = {
    "RANK": MPI_RANKS,
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": MPI_LOCAL_RANKS,
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"),
}
"""Variables set by torch's launchers, and their equivalents from Open MPI, MPICH, Intel MPI and srun."""


def adopt_mpi_ranks() -> None:
    """Sets torchrun's variables in a process started by mpirun or srun. Called first of all, because the log needs them too."""
    if "RANK" in os.environ:
        return
    found = []
    for launcher in range(3):
        ranked = {ours: theirs[launcher] for ours, theirs in MPI_VARIABLES.items()}
        # A single command inside a Slurm allocation also sees Slurm's variables; only srun sets a step.
        stepless = ranked["RANK"].startswith("SLURM") and "SLURM_STEP_ID" not in os.environ
        if ranked["RANK"] in os.environ and ranked["WORLD_SIZE"] in os.environ and not stepless:
            found.append(
                {ours: os.environ[theirs] for ours, theirs in ranked.items() if theirs in os.environ}
            )
    # srun may set MPICH's variables in addition to its own, but without the local rank. The largest set wins, then the first.
    os.environ |= max(found, key=len, default={})


def world_size() -> int:
    """Number of processes, known before they join."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_device(wanted: str) -> None:
    """Raises UserError if DeepSpeed has chosen another kind of device than `wanted` (cpu or cuda)."""
    if (taken := get_accelerator().device_name()) != wanted:
        raise UserError(
            f"the device must be {wanted}, but DeepSpeed chose {taken}: set DS_ACCELERATOR={wanted}"
        )


def check_precision(precision: str) -> None:
    """Raises ConfigError if DeepSpeed does not train in this precision on this device."""
    accelerator = get_accelerator()
    asks = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if precision in asks and not asks[precision]():
        raise ConfigError(
            "precision",
            precision,
            f"another one on this device ({accelerator.device_name()}), which has no "
            f"instructions for {precision}",
        )


def is_on_gpu() -> bool:
    """Whether this process trains on a GPU; known before it joins the others."""
    return bool(get_accelerator().device_name() == "cuda")


def attempt() -> int:
    """How often torchrun has restarted the job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def local_ranks() -> int:
    """Number of processes on this machine; 1 if the launcher does not report it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def check_devices(local_rank: int, processes: int, devices: int) -> None:
    """Raises UserError unless there is a device for each process of this machine; `devices`: number that a process can see."""
    if (wanted := max(processes, local_rank + 1)) > devices:
        raise ConfigError(
            "number of processes on this machine",
            wanted,
            f"at most the number of GPUs that each of them sees, which is {devices}: start fewer, or let each see "
            "all of the machine's (CUDA_VISIBLE_DEVICES, or Slurm's --gpus-per-node instead of --gpus-per-task)",
        )


def join(timeout_s: float = 1800.0) -> None:
    """Starts torch.distributed through DeepSpeed: NCCL on GPUs, gloo on a CPU.

    `timeout_s`: how long processes wait for each other, when joining and in every collective.

    Raises:
        UserError: fewer devices than processes. RunError: the other processes did not join in time.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            alone = {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(probe.getsockname()[1]),
            }
        os.environ |= alone
    # DeepSpeed would compile a shared-memory all-reduce for CPU ranks, which never times out when a rank hangs. It looks up that
    # one operation here; by itself it would ask for each of its operations whether it could be compiled, at every start.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if get_accelerator().device_name() == "cpu":
        log.info("device: cpu (DeepSpeed %s)", _why_cpu())
        _share_cores()
    else:
        check_devices(int(os.environ["LOCAL_RANK"]), local_ranks(), get_accelerator().device_count())
        # Before joining, because NCCL binds to this device.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    backend, timeout = get_accelerator().communication_backend_name(), timedelta(seconds=timeout_s)
    try:
        if attempt() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The store of torchrun's agent survives a restart, and still has the addresses of the dead processes. The new
            # ranks would wait for those. DeepSpeed uses a process group that already exists.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
            )
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"attempt-{attempt()}", store),
                timeout=timeout,
                rank=int(os.environ["RANK"]),
                world_size=world_size(),
            )
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
        _hold_groups_to(timeout)
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"rank {os.environ['RANK']} could not join the {world_size()} processes at {where}, waiting at most "
            f"{timeout_s:g} s: {str(error).splitlines()[0]}"
        ) from error


def _hold_groups_to(timeout: timedelta) -> None:
    """Gives all groups created from now on, by us and by DeepSpeed, the timeout of the default group. `new_group` would
    use the backend's own timeout."""
    made = getattr(dist.new_group, "without_timeout", dist.new_group)

    @functools.wraps(made)
    def new_group(ranks: Any = None, timeout: timedelta | None = None, *args: Any, **settings: Any) -> Any:
        return made(ranks, own if timeout is None else timeout, *args, **settings)

    own = timeout
    vars(new_group)["without_timeout"] = made
    dist.new_group = new_group


def leave() -> None:
    dist.destroy_process_group()


def _why_cpu() -> str:
    asked = os.environ.get("DS_ACCELERATOR")
    return f"has DS_ACCELERATOR={asked}" if asked else "found no GPU; set DS_ACCELERATOR=cuda to require one"


def _share_cores() -> None:
    """Divides the cores among local ranks. Otherwise every rank would use every core, and all would wait for each other."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks()))
        log.info(
            "threads: %d per rank (%d cores, %d local ranks; OMP_NUM_THREADS overrides)",
            torch.get_num_threads(),
            os.cpu_count(),
            local_ranks(),
        )
