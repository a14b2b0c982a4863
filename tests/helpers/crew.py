"""The main job, or a check, on several ranks of this machine, in milliseconds: forked from a process that has imported all."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHOD = multiprocessing.get_context("forkserver")
METHOD.set_forkserver_preload(["tests.helpers.crew_imports"])


class Crew:
    """A run of `world` ranks. What they print goes to files; `output(rank)` reads it."""

    def __init__(
        self,
        config_file: Path,
        *overrides: str,
        world: int = 1,
        sabotage: Callable[[int], None] | None = None,
    ):
        """`sabotage` is called with the rank in each process, before the job: a module's function or a `partial` of one."""
        self._start(config_file.parent, world, _run_job, [str(config_file), *overrides], sabotage)

    @classmethod
    def of_check(cls, check: Callable[..., None], folder: Path, *args: Any, world: int) -> "Crew":
        """check(*args), a module's function, on `world` ranks that have met. Their output goes into `folder`."""
        crew = cls.__new__(cls)
        crew._start(folder, world, _run_check, check, args)
        return crew

    def _start(self, folder: Path, world: int, *work: Any) -> None:
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = [
            METHOD.Process(target=_be_rank, args=(rank, world, port, str(log), *work))
            for rank, log in enumerate(self.logs)
        ]
        for rank in self.ranks:
            rank.start()
        self.since = time.monotonic()

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit statuses, negative for a signal."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for process in self.ranks:
            process.kill()
        assert not late, f"ranks {late} still ran after {seconds} s:\n" + "\n".join(
            self.output(rank)[-3000:] for rank in late
        )
        return [process.exitcode for process in self.ranks]

    def end_after(self, seconds: float) -> list[int]:
        """Exit statuses; what still runs after `seconds` is killed, as a launcher would."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        return [process.exitcode for process in self.ranks]

    def signal(self, rank: int, number: signal.Signals) -> None:
        process = self.ranks[rank]
        if process.is_alive():
            os.kill(process.pid, number)

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def errors(self, rank: int = 0) -> list[str]:
        return [line for line in self.output(rank).splitlines() if line.startswith("error: ")]


def _be_rank(rank: int, world: int, port: int, log: str, work: Callable[..., None], *args: Any) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(handle), "w", buffering=1) for _ in range(2))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    work(rank, *args)


def _run_job(rank: int, arguments: list[str], sabotage: Callable[[int], None] | None) -> None:
    from megadyn.pretrain import main_of_a_rank

    if sabotage is not None:
        sabotage(rank)
    sys.argv[1:] = arguments
    main_of_a_rank()


def _run_check(rank: int, check: Callable[..., None], args: tuple[Any, ...]) -> None:
    from megadyn.launch import launch

    launch.join()
    check(*args)


def wait_until(condition: Callable[[], Any], seconds: float = 60, poll_s: float = 0.02) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(poll_s)


def lines(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, without a line that is just being written."""
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def last_step(run: Path) -> int:
    return max((line["iteration"] for line in lines(run) if "lm_loss" in line), default=0)


def resumed_at(output: str) -> int:
    """The iteration that a run went on from; 0 when it began."""
    found = re.search(r"resumed from .*iteration-(\d{8})", output)
    return int(found[1]) if found else 0
