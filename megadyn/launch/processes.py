"""Processes of this machine: where a rank runs, whether a process is alive, and which launcher started this one."""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    machine: str
    """Equal on machines that share process numbers; empty if processes cannot be looked up."""
    pid: int


def here() -> Place:
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        machine = ""  # not Linux: only heartbeats show whether a rank is alive
    return Place(socket.gethostname(), machine, os.getpid())


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def process_state(pid: int) -> str | None:
    """The state letter that `ps` shows (R runs, S sleeps, T is stopped, Z is dead); None if there is no such process."""
    fields = _stat(pid)
    return fields[0] if fields else None


def process_start(pid: int) -> str | None:
    """Start time of a living process in clock ticks since boot, which with the PID identifies it. None for a dead one."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else None


class Process(NamedTuple):
    """One process, distinguishable from a later one with the same PID."""

    pid: int
    start: str
    parent: int
    words: tuple[str, ...]
    """Its command line."""

    @property
    def is_alive(self) -> bool:
        return process_start(self.pid) == self.start

    def __str__(self) -> str:
        return f"{Path(self.words[0]).name if self.words else '?'}, process {self.pid}"


def process_of(pid: int) -> Process | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    fields = _stat(pid)
    return Process(pid, fields[19], int(fields[1]), tuple(words[:-1])) if len(fields) > 19 else None


PROGRAMS = re.compile(
    r"(deepspeed|torchrun|mpirun|mpiexec(\.\w+)?|orterun|prterun|prte|orted|prted|hydra_\w+_proxy|srun|"
    r"slurmstepd:?)"
)
MODULES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "megadyn.launch.torchrun",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
)
WRAPPERS = 3
"""Largest number of processes (a shell, numactl, a profiler) between a launcher and a rank."""


def is_launcher(process: Process) -> bool:
    """Whether it is a program that starts ranks, or its daemon."""
    words = process.words
    if any(flag == "-m" and module in MODULES for flag, module in pairwise(words)):
        return True
    script = words[1:2] if words and re.match(r"python[\d.]*$", Path(words[0]).name) else words[:1]
    return any(PROGRAMS.fullmatch(Path(word.partition(" ")[0]).name) for word in script)


def launchers(look: Callable[[int], Process | None] = process_of) -> list[Process]:
    """The processes whose end means that this rank has lost its launcher, nearest first; empty if no known launcher started it.

    A parent that is not a launcher is not watched: a shell that started a run in the background may end. `deepspeed`
    starts one process on each machine, which starts the ranks; if it does so over ssh, there is a shell of that
    connection in between.
    """
    process = look(os.getppid())
    for _ in range(WRAPPERS):
        if process is not None and not is_launcher(process):
            process = look(process.parent)
    found = []
    while process is not None and is_launcher(process):
        found.append(process)
        process = look(process.parent)
    if found and "deepspeed.launcher.launch" in found[-1].words and process is not None:
        found += _connection(process, look)
    return found


def _connection(process: Process, look: Callable[[int], Process | None]) -> list[Process]:
    """The ssh server that runs a command (`bash -c ...`); not that of an interactive shell, which a run may outlive."""
    if "-c" in process.words[1:2] and Path(process.words[0]).name in ("sh", "bash", "dash", "zsh"):
        process_above = look(process.parent)
    else:
        process_above = process
    is_server = (
        process_above is not None and process_above.words[:1] and process_above.words[0].startswith("sshd")
    )
    return [process_above] if is_server and process_above is not None else []


@contextmanager
def while_alive(launchers: Sequence[Process], end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """Ends this process with status 1 if one of `launchers` ends during the block, even if the main thread is stuck.

    For the time in which ranks wait for each other, before a `Watchdog` exists.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.5):
            if gone := next((process for process in launchers if not process.is_alive), None):
                print(f"error: the launcher ({gone}) is gone", file=sys.stderr, flush=True)
                end(1)
                return

    thread = threading.Thread(target=watch, name="launchers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
