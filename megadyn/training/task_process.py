"""The process that evaluates a checkpoint on tasks: how it is started, what it may inherit, and what it says.

It is `megadyn.evaluation.tasks`. Nothing of it is imported here, because lm_eval must not be in a rank. It has a session of its
own, because Ctrl-C is for the ranks, and ends when its parent is gone.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megadyn.config.tasks import TasksConfig
from megadyn.errors import ConfigError, UserError

MODULE = "megadyn.evaluation.tasks"
OF_A_RANK = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|CROSS_|MASTER_|TORCHELASTIC_|OMPI_|PMI_|PMIX_|PRTE_|MPI_|MV2_|SLURM_)|(RANK|WORLD_SIZE)$"
)
"""Variables of launchers: with them lm_eval would take the process for a rank, and wait for others."""
USER_ERROR = 2


def refuse_without_package(settings: TasksConfig) -> None:
    """Raises ConfigError if tasks are asked for without lm_eval. Imports nothing."""
    if settings.names and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "training.tasks.names",
            settings.names,
            "left out: the lm_eval package is missing (pip install lm_eval)",
        )


def refuse_unknown(settings: TasksConfig, device: str | None = None) -> None:
    """Raises UserError for tasks that lm_eval does not know, and for a device that is not here. Takes seconds.

    `device`: to look for in place of that of `settings`.
    """
    if not settings.names:
        return
    done = subprocess.run(
        command(names=settings.names, device=device or settings.device),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(os.environ, settings.threads),
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        raise UserError(problem_in(done.stderr, done.returncode).removeprefix("error: "))


def start(settings: TasksConfig, checkpoint: Path, digest: str, output: Path) -> "subprocess.Popen[bytes]":
    """Starts the evaluation of a checkpoint. What it prints goes beside `output`. Raises OSError if it cannot be started."""
    words = command(
        names=settings.names,
        device=settings.device,
        batch_size=settings.batch_size,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        checkpoint=str(checkpoint),
        digest=digest,
        output=str(output),
    )
    output.unlink(missing_ok=True)
    with log_beside(output).open("wb") as said:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment(os.environ, settings.threads),
            start_new_session=True,
        )


def stop(process: "subprocess.Popen[bytes]", output: Path) -> None:
    """Ends the process, and those that it started, and removes its export."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(export_beside(output), ignore_errors=True)


def command(**asked: Any) -> list[str]:
    """The command line: keys are those of `Asked`."""
    return [sys.executable, "-m", MODULE, json.dumps({"parent": os.getpid(), **asked})]


def environment(of_rank: Mapping[str, str], threads: int) -> dict[str, str]:
    """A rank's variables without what makes it a rank."""
    kept = {name: value for name, value in of_rank.items() if not OF_A_RANK.match(name)}
    return kept | {"OMP_NUM_THREADS": str(threads)}


def log_beside(output: Path) -> Path:
    return output.with_suffix(".log")


def export_beside(output: Path) -> Path:
    """Where the evaluation exports the checkpoint to, while it runs."""
    return output.with_name(f".export-{output.stem}")


def problem_in(said: str, status: int) -> str:
    """In one line why the process failed, from what it printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if status == USER_ERROR and (found := [line for line in lines if line.startswith("error: ")]):
        return found[-1]
    return f"{lines[-1] if lines else 'it printed nothing'} (exit status {status})"
