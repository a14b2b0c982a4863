"""Runs a check on N processes of this machine, joined by gloo."""

import importlib
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.helpers.crew import METHOD

WAIT = timedelta(seconds=120)


def run_on_ranks(check: Any, world_size: int, *args: Any) -> None:
    """check(*args) in `world_size` processes; a rank that fails, or waits too long for another, fails the test.

    In each process torch.distributed is up and the launcher's variables (RANK, LOCAL_RANK, ...) are set.
    """
    # from the fork server that has imported all
    mp.start_processes(
        _rank_main,
        (world_size, _free_port(), check, args),
        nprocs=world_size,
        start_method=METHOD.get_start_method(),
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, check: Any, args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": str(world_size),
    }
    importlib.import_module(
        "tests.helpers.crew_imports"
    )  # the fork server may be another's, with other modules
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=WAIT)
    check(*args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
