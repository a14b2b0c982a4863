"""Makes this process compute the same bits each time."""

import os

import torch

from megadyn.errors import ConfigError
from megadyn.log import log

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS sums in the same order each time; the second takes less memory and is slower."""


def be_deterministic(wanted: bool) -> None:
    """With `wanted`, torch takes algorithms that give the same bits each time, and raises RuntimeError where it has none. Called
    before the first operation on a GPU.

    Raises:
        ConfigError: the environment asks cuBLAS for another workspace.
    """
    if not wanted:
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(False)
        return
    workspace = os.environ.setdefault(VARIABLE, WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise ConfigError(
            VARIABLE, workspace, f"{' or '.join(WORKSPACES)}, or unset, with training.deterministic"
        )
    torch.use_deterministic_algorithms(True)
    # To fill what torch.empty returns would find programs that read it; those that do not only become slower.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch's stubs lack it
    log.info("deterministic algorithms: on (cuBLAS workspace %s)", workspace)
